"""Search for hyper-parameters: its space, its algorithm and scheduler, and the packs that train its trials.

`spec.load` reads a search, `space.validate` checks it against the configuration that it searches, and `space.to_ray`
or `space.to_optuna` converts its space for the library that draws from it.
"""
