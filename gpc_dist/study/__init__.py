"""Studies: several methods, each with the same search budget, compared on several tasks.

`spec.load` reads a study, `run.run_study` runs it, and `results.read_study` reads its results.
"""
