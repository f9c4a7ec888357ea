"""A study: several methods, each with the same budget of search, on several tasks, and what came of it.

`spec.load` reads a study, `run.run_study` carries it out, and `report.write_report` says what is in its folder.
"""
