"""Slurm: submit runs, follow and cancel their jobs, and check a cluster.

The batch scripts in `slurm/` also work without this package; `submit` passes them their options and files.
"""
