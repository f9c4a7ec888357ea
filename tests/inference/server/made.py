"""Adapters of many kinds with random weights, on the tiny encoder, and requests to an application without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpc_dist import config as configuration
from gpc_dist.adapter.lane import Adapter
from gpc_dist.adapter.store import save_adapter
from gpc_dist.config import AdapterConfig
from gpc_dist.distributed.world import alone
from gpc_dist.inference.server.options import Options
from gpc_dist.tasks import make_task
from gpc_dist.training.session import load_base
from tests.tiny import WORDS

CATS = {"name": "cats", "text": ["text"], "labels": ["without", "with"]}
PAIR = {"name": "pair", "text": ["one", "two"], "labels": ["no", "maybe", "yes"]}
PICK = {"name": "pick", "kind": "choice", "text": ["text"], "choices": ["first", "second", "third"]}
SIZE = {"name": "size", "kind": "regression", "text": ["text"]}
RTE = {"name": "rte"}

KINDS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "recurrent": (CATS, {"prompt_tokens": 4}),
    "gated": (PAIR, {"prompt_tokens": 4, "cell": "gated", "cell_scale": "text", "cell_rank": 8}),
    "residual": (PICK, {"prompt_tokens": 4, "cell": "residual", "cell_per_layer": True}),
    "rating": (SIZE, {"prompt_tokens": 4, "cell_units": "remember", "cell_norm": False}),
    "vanilla": (RTE, {"prompt_tokens": 4, "method": "prompt-tuning", "head_hidden": True}),
    "deep": (CATS, {"prompt_tokens": 4, "method": "deep-prompt"}),
    "own-prompt": (CATS, {"prompt_tokens": 6, "pooling": "prompt"}),
    "probe": (CATS, {"method": "linear-probe"}),
    "mixing-probe": (PAIR, {"method": "linear-probe", "head_layers": "mix", "first_layer": 1}),
    "late": (CATS, {"prompt_tokens": 4, "first_layer": 2}),
    "late-choice": (PICK, {"prompt_tokens": 4, "first_layer": 2, "method": "prompt-tuning"}),
    "late-pair": (PAIR, {"prompt_tokens": 3, "first_layer": 2, "cell": "gated"}),
    "later": (CATS, {"prompt_tokens": 4, "first_layer": 0.75, "method": "deep-prompt"}),
}
"""Task and adapter of each."""

ROWS: dict[str, Sequence[Mapping[str, Any]]] = {
    "cats": [{"text": "a cat sleeps under the red tree"}, {"text": "dog", "id": "second"}],
    "size": [{"text": "a cat sleeps under the red tree"}, {"text": " ".join(WORDS)}],
    "pair": [{"one": "the bird sings", "two": "no"}, {"one": "a girl reads", "two": "the boy eats bread"}],
    "pick": [{"text": "water", "first": "apple", "second": "stone and bread", "third": "fish"}],
    "rte": [{"premise": "the fish swims in the river", "hypothesis": "the fish runs"}],
}
"""Rows of each task; some of the same texts."""


def write_adapter(
    folder: Path, encoder: Path, task: Mapping[str, Any], adapter: Mapping[str, Any], seed: int = 0
) -> Path:
    """An adapter of random weights, all of which change what it answers."""
    tree = {"encoder": {"path": str(encoder)}, "task": dict(task), "data": {"max_length": 32}}
    given = configuration.build({**tree, "adapter": dict(adapter)})
    base = load_base(given, alone(given.engine))
    made = Adapter(
        AdapterConfig(**adapter), base.parts.shape, make_task(given.task, given.data).outputs, seed
    )
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    values = given.dump()
    save_adapter(folder, made, base.identity, {"task": values["task"], "data": values["data"]})
    return folder


def options(*places: object, **more: Any) -> Options:
    return Options([str(place) for place in places], {"engine.device": "cpu"}, **more)


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def tree(self) -> Any:
        return json.loads(self.body)


async def ask(
    app: Any, path: str, tree: Any = None, *, body: bytes = b"", gone: bool = False, **headers: str
) -> Reply:
    """Make a request of an ASGI application.

    Args:
        tree: what to send as JSON, or else `body`; a GET without either.
        gone: the client leaves as soon as it has sent this.
        headers: with `_` for `-`.
    """
    body = body if tree is None else json.dumps(tree).encode()
    incoming = [{"type": "http.request", "body": body}, *([{"type": "http.disconnect"}] if gone else [])]
    outgoing: list[Any] = []
    never = asyncio.Event()

    async def receive() -> Any:
        if not incoming:
            await never.wait()
        return incoming.pop(0)

    async def send(message: Any) -> None:
        outgoing.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST" if body else "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    found = {name.decode(): value.decode() for name, value in outgoing[0]["headers"]}
    return Reply(outgoing[0]["status"], found, b"".join(each.get("body", b"") for each in outgoing[1:]))
