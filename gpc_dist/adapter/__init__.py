"""The method: prompt, cell and head, and their graft onto a frozen encoder.

Works with plain PyTorch and transformers; does not use DeepSpeed or MLflow.

    model = attach(AutoModel.from_pretrained("bert-base-uncased"), AdapterConfig(prompt_tokens=20))
    loss = cross_entropy(model(**tokenizer(texts, return_tensors="pt", padding=True)), labels)
"""

from gpc_dist.adapter.graft import GraftedEncoder
from gpc_dist.adapter.lane import Adapter
from gpc_dist.adapter.make import attach
from gpc_dist.config import AdapterConfig

__all__ = ["Adapter", "AdapterConfig", "GraftedEncoder", "attach"]
