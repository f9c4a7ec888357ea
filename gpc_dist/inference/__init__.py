"""Trained adapters at work: evaluation, prediction, inspection, official scores and serving."""
