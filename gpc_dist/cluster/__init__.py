"""Slurm: submitting runs, following and cancelling their jobs, and checking a cluster.

The batch scripts in `slurm/` do the work and run without this package; `submit` gives them what they need.
"""
