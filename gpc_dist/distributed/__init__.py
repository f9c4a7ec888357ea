"""Ranks: the process group, launching, the trained group's optimizer, and checkpoints of the training state."""
