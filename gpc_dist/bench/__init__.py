"""`gpc-dist bench`: what a training step costs on this machine, measured."""
