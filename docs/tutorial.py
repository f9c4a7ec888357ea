# %% [markdown]
# # Tutorial: a prompt and a cell, by hand
#
# This page is a script, `docs/tutorial.py`; its cells run in a notebook or with plain Python in a few
# seconds, on a CPU and without network, and a test runs them. It tunes a Global Prompt Cell on the packaged
# encoder (the extra `demo`: MiniLM, 23 million parameters, frozen) without the trainer, DeepSpeed or a
# configuration, to show what these work on.

# %%
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from gpc_dist.adapter import AdapterConfig, GraftedEncoder, attach
from gpc_dist.config import EncoderConfig
from gpc_dist.encoder.frozen import encoder_path

torch.manual_seed(0)
path = encoder_path(
    EncoderConfig()
)  # the folder of the packaged encoder; any BERT, RoBERTa or T5 folder will do
encoder, tokenizer = AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)

# %% [markdown]
# ## Data
#
# Is Maria the late one (1), or Paul (0)? Both classes have the same words, so their mean says little: a head
# needs states that know who did what.

# %%
late = [
    "Maria was late, so Paul began without her.",
    "Paul waited an hour until Maria came.",
    "When Maria arrived at last, Paul had left.",
    "Paul was there on time, unlike Maria.",
    "Maria missed the bus, and Paul saved her a seat.",
    "Paul looked at his watch and called Maria.",
]
texts = late + [text.replace("Maria", "?").replace("Paul", "Maria").replace("?", "Paul") for text in late]
labels = torch.tensor([1] * len(late) + [0] * len(late))
batch = tokenizer(texts, padding=True, return_tensors="pt")

# %% [markdown]
# ## Attach
#
# `attach` puts an adapter onto the encoder: a prompt of P vectors before the text, a cell that rewrites the
# prompt between the layers, and a linear head. It works through hooks; the encoder's own weights and code
# stay as they are.

# %%
model = attach(
    encoder, AdapterConfig(method="gpc", cell="recurrent", prompt_tokens=8), outputs=2, tokenizer=tokenizer
)
trained = sum(parameter.numel() for parameter in model.adapter.parameters())
frozen = sum(parameter.numel() for parameter in encoder.parameters())
print(f"{trained:,} trained, {frozen:,} frozen, {100 * trained / frozen:.1f} %")
for name, parameter in model.adapter.named_parameters():
    print(f"  {name:28} {tuple(parameter.shape)}")

# %% [markdown]
# ## Train
#
# Any loop of PyTorch does. The cell gets a smaller rate than the prompt, because a change of its matrices
# acts at every layer and position at once (`train.cell_lr` of a recipe).

# %%
cell = [parameter for name, parameter in model.adapter.named_parameters() if name.startswith("cell")]
others = [parameter for name, parameter in model.adapter.named_parameters() if not name.startswith("cell")]
optimizer = torch.optim.AdamW(
    [{"params": cell, "lr": 1e-3}, {"params": others, "lr": 1e-2}], weight_decay=0.0
)
for step in range(1, 31):
    loss = torch.nn.functional.cross_entropy(model(**batch), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}  loss {loss.item():.4f}")
assert all(
    parameter.grad is None for parameter in encoder.parameters()
)  # nothing is computed for frozen weights
accuracy = (model(**batch).argmax(1) == labels).float().mean().item()
print(f"accuracy on what was trained: {accuracy:.2f}")

# %% [markdown]
# ## Keep and load
#
# An adapter's folder is a safetensors file and a JSON card that names the encoder by a fingerprint; another
# encoder is refused.

# %%
folder = Path(tempfile.mkdtemp()) / "late"
model.save_pretrained(folder)
print(sorted(f"{file.name}: {file.stat().st_size:,} bytes" for file in folder.iterdir()))
again = GraftedEncoder.from_pretrained(folder, AutoModel.from_pretrained(path))
assert torch.equal(again(**batch), model(**batch))

# %% [markdown]
# ## Late prompts
#
# With `first_layer=3` the prompt enters before layer 3 of the six. What the layers below make of the text
# depends on nothing that is trained, so it is computed once (`lower`) and every step takes it: half the work.

# %%
half = attach(
    AutoModel.from_pretrained(path),
    AdapterConfig(prompt_tokens=8, first_layer=3),
    outputs=2,
    tokenizer=tokenizer,
)
states = half.lower(batch["input_ids"], batch["attention_mask"])
assert torch.allclose(half(**batch, text_states=states), half(**batch), atol=1e-5)
print(f"text states: {tuple(states.shape)}")

# %% [markdown]
# ## What a command adds
#
# `gpc-dist train` does the same for a table of yours, and adds what a real run needs: several ranks and a
# sharded encoder, batches of like lengths, evaluation and the best checkpoint, resume to the same bits, and
# the record in MLflow. [Train](train.md) goes on from here; [the method](method.md) says what the cells
# compute.
