"""The commands of `gpc-dist`: one module for each, with its help, its arguments, and one call."""
