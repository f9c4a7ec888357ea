"""What `gpc-dist inspect` says of a prompt, against the same found another way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gpc_dist.adapter.store import read_card
from gpc_dist.distributed.world import World
from gpc_dist.errors import EXIT_USAGE
from gpc_dist.inference.adapters import adapter_config, open_adapter
from gpc_dist.inference.inspect import inspect
from gpc_dist.tasks import collate
from gpc_dist.training.losses import summed_loss
from gpc_dist.training.session import Session
from tests.conftest import gpc


@pytest.fixture(scope="module", params=[pytest.param("residual", marks=pytest.mark.slow), "gated"])
def adapter(
    request: pytest.FixtureRequest, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("runs") / request.param
    words = ("--adapter.cell", request.param, "--train.cell_lr", 0.03, "--run.dir", run)
    assert gpc("train", tiny_recipe, *words) == 0
    return run / "adapter"


@pytest.fixture(scope="module")
def session(adapter: Path) -> Session:
    config = adapter_config(read_card(adapter), {"engine.device": "cpu"})
    return open_adapter(adapter, config, World(0, 1, 0, torch.device("cpu")))


def run_once(
    session: Session, change: tuple[int, torch.Tensor] | None = None
) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
    """Loss of the first example, the states that enter each layer and the prompt as each layer encodes it, with a
    change of one layer's prompt."""
    states, encoded = [], []

    def hook(index: int) -> Any:
        def enters(_: Any, args: tuple[Any, ...]) -> Any:
            h = args[0].clone()
            if change is not None and change[0] == index:
                h[:, : session.model.prompt_tokens] += change[1]
            states.append(h.detach())
            return h, *args[1:]

        return enters

    def leaves(_: Any, __: Any, output: Any) -> None:
        h = output[0] if isinstance(output, tuple) else output
        encoded.append(h[:, : session.model.prompt_tokens].clone())

    handles = []
    for index, layer in enumerate(session.base.parts.layers):
        handles.append(layer.register_forward_pre_hook(hook(index), prepend=True))
        handles.append(layer.register_forward_hook(leaves, prepend=True))
    split = session.split(session.task.read("validation")[:1])
    batch = collate(split.encoded, [0], session.pad_id)
    with torch.no_grad():
        outputs = session.model(batch.input_ids, batch.attention_mask, batch.token_type_ids)
        loss = summed_loss(session.task.kind, outputs, batch).item()
    for handle in handles:
        handle.remove()
    return loss, states, encoded


@pytest.mark.slow
def test_the_gradient_is_the_slope_of_the_loss(session: Session) -> None:
    """Of each value of the prompt by itself: central differences, wide enough for the head's float32 loss."""
    session.model.double()
    found = inspect(session, 1)
    tokens = session.model.prompt_tokens
    size = session.base.parts.shape.hidden_size
    for layer in (0, 2, 3):
        slopes = []
        for position in range(tokens):
            for feature in range(size):
                step = torch.zeros(tokens, size, dtype=torch.float64)
                step[position, feature] = 3e-3
                up, down = (run_once(session, (layer, sign * step))[0] for sign in (1, -1))
                slopes.append((up - down) / 6e-3)
        assert found[layer].gradient_norm == pytest.approx(torch.tensor(slopes).norm().item(), rel=1e-3)
    session.model.float()


def test_cosine_and_sizes_are_those_of_the_states(session: Session) -> None:
    found = inspect(session, 1)
    _, states, _ = run_once(session)
    tokens = session.model.prompt_tokens
    first = states[0][0, :tokens]
    for layer, state in enumerate(states):
        prompt, text = state[0, :tokens], state[0, tokens:]
        cosines = (prompt * first).sum(-1) / (prompt.norm(dim=-1) * first.norm(dim=-1))
        assert found[layer].cosine == pytest.approx(cosines.mean().item(), rel=1e-4)
        size = prompt.shape[-1] ** 0.5
        assert found[layer].prompt_rms == pytest.approx((prompt.norm(dim=-1) / size).mean().item(), rel=1e-4)
        assert found[layer].text_rms == pytest.approx((text.norm(dim=-1) / size).mean().item(), rel=1e-4)
    assert found[0].cosine == pytest.approx(1)


def test_the_cell_is_seen_after_every_layer_but_the_last(session: Session) -> None:
    found = inspect(session, 23)
    assert found[0].written is None
    assert all(each.written > 0 for each in found[1:])  # type: ignore[operator]
    gated = session.config.adapter.cell == "gated"
    assert [each.gate is not None for each in found] == [False, *[gated] * 3]
    for each in found:
        assert each.gate is None or 0 < each.gate < 1


def test_what_the_cell_writes_and_its_gate_are_those_of_the_states(session: Session) -> None:
    found, tokens = inspect(session, 1), session.model.prompt_tokens
    _, states, encoded = run_once(session)
    (cell,) = session.model.adapter.cell  # type: ignore[misc]

    def unit(state: torch.Tensor) -> torch.Tensor:
        return state / state.square().mean(-1, keepdim=True).sqrt()

    for layer in (1, 2, 3):
        e, p = encoded[layer - 1][0], states[layer - 1][0, :tokens]
        change = (states[layer][0, :tokens] - e).norm(dim=-1) / e.norm(dim=-1)
        assert found[layer].written == pytest.approx(change.mean().item(), rel=1e-4)
        if found[layer].gate is not None:
            remember, forget = cell.remember[0].weight, cell.forget[0].weight
            gate = torch.sigmoid(unit(e) @ remember.T + unit(p) @ forget.T + cell.bias)
            assert found[layer].gate == pytest.approx(gate.mean().item(), rel=1e-4)


def test_the_command_writes_figures_and_a_plot(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--json", tmp_path / "x.json", "--png", tmp_path / "x.png", "--engine.device", "cpu")
    other = tmp_path / "other" / "adapter"
    shutil.copytree(adapter, other)
    assert gpc("inspect", adapter, other, "--examples", 8, *words) == 0
    found = json.loads((tmp_path / "x.json").read_text())["adapters"]
    assert list(found) == [str(adapter), str(other)]
    assert len(found[str(adapter)]) == 4
    assert found[str(adapter)] == found[str(other)]
    assert str(other) in capsys.readouterr().out
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_an_adapter_without_a_prompt_is_refused(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--adapter.method", "linear-probe", "--train.steps", 1, "--run.dir", tmp_path)
    assert gpc("train", tiny_recipe, *words) == 0
    assert gpc("inspect", tmp_path / "adapter") == EXIT_USAGE
    assert "has no prompt to inspect: its adapter.method is linear-probe" in capsys.readouterr().err
