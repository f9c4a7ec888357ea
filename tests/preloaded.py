"""What the processes of the tests have imported when they start; see `processes`. Importing it starts nothing.

Ray is left out: it reads its environment variables when it is imported.
"""

import os
from importlib import import_module

os.environ["DS_ACCELERATOR"] = "cpu"

for name in (
    "gpc_dist.cluster.submit",
    "gpc_dist.bench.bench",
    "gpc_dist.inference.adapters",
    "gpc_dist.private.deepspeed",
    "gpc_dist.private.transformers",
    "gpc_dist.training.train",
    "mlflow",
    "sklearn.metrics",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
):
    import_module(name)
