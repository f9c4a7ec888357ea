"""The commands of `gpc-dist`: for each a file with its help, its arguments, and one call."""
