"""The planner: memory by a dry run and time by a model, for every way to lay a run out over devices."""
