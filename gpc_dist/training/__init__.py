"""The loop: steps, schedule, evaluation, stop and resume; and what a trained adapter is used for."""
