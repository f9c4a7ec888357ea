"""Training: the trainer, its step, evaluation, a run's state, stop and resume."""
