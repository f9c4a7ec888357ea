"""The same application on Ray Serve."""

from __future__ import annotations

import signal
import urllib.error
from pathlib import Path

import pytest

from gpc_dist.inference.server.options import TOKEN
from tests.inference.server.servers import post, started
from tests.processes import free_port


@pytest.mark.ray
def test_replicas_answer_until_they_are_told_to_end(
    adapters: dict[str, Path], shared_ray: dict[str, str]
) -> None:
    words = (adapters["late"], "--port", free_port(), "--replicas", "1-2")
    with started(*words, **shared_ray, **{TOKEN: "s3cret"}) as (server, address):
        found = post(address, "late", {"rows": ["a cat", "a dog"]}, Authorization="Bearer s3cret")
        assert [each["id"] for each in found] == [0, 1]
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(address, "late", {"row": "a cat"})
        assert refused.value.code == 401
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0, server.stderr


@pytest.mark.ray
def test_a_configuration_file_of_serve_names_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpc_dist.inference.server import ray_serve

    monkeypatch.setattr(ray_serve, "deployed", lambda *given: given)
    monkeypatch.setenv(TOKEN, "s3cret")
    given = {"adapters": "runs/rte,mine=runs/cb", "replicas": "1-4", "engine.device": "cpu"}
    options, replicas = ray_serve.application(given)  # type: ignore[misc]
    assert (list(options.places), options.settings) == (
        ["runs/rte", "mine=runs/cb"],
        {"engine.device": "cpu"},
    )
    assert (replicas, options.token) == ((1, 4), "s3cret")
