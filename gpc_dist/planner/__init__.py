"""The planner: memory and FLOPs by a dry run and time by a model, for every regime of a run on its devices."""
