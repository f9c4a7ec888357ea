"""What a run leaves behind: its folder of plain files, and MLflow as a replica of that folder.

The run folder is the single source of truth. The trainer writes it (`folder`, `metrics`, `facts`)
and never talks to MLflow; a separate process, the follower, replays the folder into MLflow while
the run goes on (`follower`). Replaying it later is the same code (`sync.sync_run`, the command
`gpc-dist sync RUN`), for nodes without network and tracking servers that were down. So MLflow can
neither stop nor slow a run, each run has one writer, and no value is recorded twice.

A search is the same once more: its folder holds those of its trials, and one recorder replays them
all (`search`, `trial`). `mirror` is what the replicas of runs, trials and searches share.
"""
