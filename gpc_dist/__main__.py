"""`python -m gpc_dist`."""

from gpc_dist.interpreter import leave_current_folder

leave_current_folder()

from gpc_dist.cli import entry  # noqa: E402

entry()
