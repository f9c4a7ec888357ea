"""Many adapters on one encoder, over HTTP: `gpc-dist serve`.

`places` finds adapters, `catalog` holds those that are loaded, `encoder` runs them, `batcher` decides what runs next,
`app` answers requests behind `gate`; `run` and `ray_serve` are the two ways to start it.
"""
