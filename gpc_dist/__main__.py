from gpc_dist.cli import entry

entry()
