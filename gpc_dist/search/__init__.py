"""A search for hyper-parameters: what is tried, in which order, and on which resources.

`spec.load` reads a search, `space.validate` checks it against the configuration it searches, and `space.to_ray`
or `space.to_optuna` hands its space to the library that draws from it.
"""
