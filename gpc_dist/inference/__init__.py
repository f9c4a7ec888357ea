"""Use of trained adapters: evaluation, prediction, inspection, official scores and serving."""
