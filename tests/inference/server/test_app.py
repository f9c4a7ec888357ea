"""What clients are told: answers, refusals with the remedy, and nothing of the program's inside."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpc_dist.adapter.store import read_card
from gpc_dist.errors import UserError
from gpc_dist.inference.adapters import Predictor
from gpc_dist.inference.server.answers import Asked
from gpc_dist.inference.server.app import make_app
from gpc_dist.inference.server.encoder import SharedEncoder
from gpc_dist.inference.server.service import Service
from tests.inference.server.made import ROWS, Reply, ask, options, write_adapter

PREDICT = "/v1/adapters/{}/predict"
Asks = Callable[[Any], Awaitable[Any]]


def answered(adapters: dict[str, Path], asks: Asks, **more: Any) -> Any:
    """What a coroutine gives that is called with the application while it answers."""
    service = Service(options(adapters["recurrent"], adapters["gated"], adapters["residual"], **more))
    app = make_app(service)

    async def run() -> Any:
        async with service.running():
            return await asks(app)

    return asyncio.run(run())


def one(adapters: dict[str, Path], path: str, tree: Any = None, **more: Any) -> Reply:
    return answered(adapters, lambda app: ask(app, path, tree, **more))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Passes wait; set by the first one that runs, and to be set to let them go."""
    running, go = threading.Event(), threading.Event()
    run = SharedEncoder.run

    def wait(self: SharedEncoder, rows: Any) -> Any:
        running.set()
        assert go.wait(60)
        return run(self, rows)

    monkeypatch.setattr(SharedEncoder, "run", wait)
    yield running, go
    go.set()


def test_rows_texts_and_one_row_are_answered_alike(adapters: dict[str, Path]) -> None:
    async def asks(app: Any) -> list[Reply]:
        path = PREDICT.format("recurrent")
        texts = [row["text"] for row in ROWS["cats"]]
        trees: list[Any] = [{"rows": list(ROWS["cats"])}, {"rows": texts}, {"row": texts[0]}]
        return [await ask(app, path, tree) for tree in trees]

    whole, texts, single = (reply.tree["predictions"] for reply in answered(adapters, asks))
    expected = Predictor(adapters["recurrent"], {"engine.device": "cpu"}).predict(ROWS["cats"])
    assert [each["id"] for each in whole] == [0, "second"]
    for found, right in zip(whole, expected, strict=True):
        assert found["prediction"] == right.value
        assert found["probabilities"] == pytest.approx(dict(right.probabilities or {}), abs=1e-5)
    assert [each["prediction"] for each in texts] == [each["prediction"] for each in whole]
    assert single[0]["probabilities"] == pytest.approx(whole[0]["probabilities"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "body", "status", "said"),
    [
        (
            "nobody",
            b'{"row": "a"}',
            404,
            "there is no adapter 'nobody': there are gated, recurrent, residual",
        ),
        ("gated", b'{"row": {"one": "a"}}', 422, "row 1 of the input: there is no column 'two'"),
        ("gated", b'{"row": "a"}', 422, "row 1 of the input is a text, and task pair reads one, two"),
        ("recurrent", b'{"rows": ["a", {"text": null}]}', 422, "row 2 of the input: column 'text' is empty"),
        ("recurrent", b'{"rows": [{"text": ["a"]}]}', 422, "row 1 of the input: column 'text' holds a list"),
        ("recurrent", b'{"rows": []}', 422, "rows is empty"),
        ("gated", b'{"row": ""}', 422, "row 1 of the input is a text"),
        ("recurrent", b'{"rows": [3]}', 422, "rows.0"),
        ("recurrent", b'{"rows": ["a"], "row": "a"}', 422, "give either rows or row"),
        ("recurrent", b'{"texts": ["a"]}', 422, "texts: Extra inputs are not permitted"),
        ("recurrent", b"[]", 422, "the request is not valid"),
        ("recurrent", b"{", 422, "the request is not valid JSON"),
        ("recurrent", b'{"row": ' + b"[" * 5000, 422, "nested too deeply"),
        (
            "recurrent",
            b'{"row": {"text": "a", "id": ' + b"[" * 300 + b"]" * 300 + b"}}",
            422,
            "within each other",
        ),
        ("recurrent", b'{"row": "\\ud800"}', 422, "one half of a character"),
        ("recurrent", b'{"row": "\xff"}', 422, "the request is not valid JSON"),
        ("recurrent", b'{"rows": ["a", "b", "c", "d"]}', 413, "the request has 4 rows, and may have 3"),
        ("recurrent", b'{"row": "' + b"a" * 20_000 + b'"}', 413, "may have 16384 bytes"),
    ],
)
def test_what_is_wrong_is_said(
    adapters: dict[str, Path], name: str, body: bytes, status: int, said: str
) -> None:
    async def asks(app: Any) -> Reply:
        return await ask(app, PREDICT.format(name), body=body)

    reply = answered(adapters, asks, most_rows=3, most_body_kib=16)
    assert (reply.status, list(reply.tree)) == (status, ["detail"])
    assert said in reply.tree["detail"]
    assert "Traceback" not in reply.tree["detail"]


def test_of_many_wrong_rows_the_first_is_told_alone() -> None:
    tracemalloc.start()
    with pytest.raises(UserError, match="rows.0"):
        Asked.parse(b'{"rows": [' + b"1, " * 100_000 + b"1]}")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 << 20


def test_a_size_that_is_announced_is_refused_before_it_is_read(adapters: dict[str, Path]) -> None:
    reply = one(adapters, PREDICT.format("recurrent"), body=b"{", content_length="1048577")
    assert reply.status == 413


def test_an_id_that_json_does_not_have_is_null(adapters: dict[str, Path]) -> None:
    reply = one(adapters, PREDICT.format("recurrent"), body=b'{"row": {"text": "cat", "id": NaN}}')
    assert reply.tree["predictions"][0]["id"] is None


def test_candidates_are_rows_of_the_queue(adapters: dict[str, Path]) -> None:
    async def asks(app: Any) -> list[Reply]:
        path, row = PREDICT.format("residual"), ROWS["pick"][0]
        return [await ask(app, path, {"rows": [row] * count}) for count in (1, 2)]

    one, two = answered(adapters, asks, queue_rows=4)
    assert one.status == 200
    assert (two.status, "6 texts, and at most 4" in two.tree["detail"]) == (422, True)


def test_more_rows_than_will_ever_have_room_are_not_to_come_again(adapters: dict[str, Path]) -> None:
    path, rows = PREDICT.format("recurrent"), ["a"] * 5
    reply = answered(adapters, lambda app: ask(app, path, {"rows": rows}), queue_rows=4)
    assert (reply.status, "5 rows, and at most 4" in reply.tree["detail"]) == (422, True)


def test_what_has_nothing_to_predict_is_said(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = {
        "multirc": {"idx": 0, "passage": {"text": "a cat", "questions": []}},
        "record": {"idx": 0, "passage": "a cat", "query": "@placeholder runs", "entities": []},
    }
    places = [write_adapter(tmp_path / name, tiny_encoder, {"name": name}, {}) for name in rows]
    service = Service(options(*places))

    async def asks() -> list[Reply]:
        async with service.running():
            return [await ask(make_app(service), PREDICT.format(name), {"row": rows[name]}) for name in rows]

    for reply in asyncio.run(asks()):
        assert reply.status == 422
        assert "nothing to choose from, or to predict" in reply.tree["detail"]


def test_what_has_no_room_is_refused_until_there_is(adapters: dict[str, Path], held: Any) -> None:
    running, go = held

    async def asks(app: Any) -> list[Reply]:
        path = PREDICT.format("recurrent")
        first = asyncio.create_task(ask(app, path, {"rows": ["a", "b"]}))
        await asyncio.to_thread(running.wait, 60)
        refused = await ask(app, path, {"row": "c"})
        go.set()
        return [refused, await first, await ask(app, path, {"row": "c"})]

    refused, first, again = answered(adapters, asks, queue_rows=2)
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert (first.status, again.status) == (200, 200)


def test_what_takes_too_long_is_given_up(adapters: dict[str, Path], held: Any) -> None:
    async def asks(app: Any) -> list[Any]:
        path = PREDICT.format("recurrent")
        late = await ask(app, path, {"row": "a"})
        held[1].set()
        return [late, await ask(app, path, {"row": "a"})]

    late, _ = answered(adapters, asks, timeout_s=0.2)
    assert late.status == 504
    assert "0.2 s" in late.tree["detail"]


def test_a_client_that_has_gone_is_not_worked_for(adapters: dict[str, Path], held: Any) -> None:
    running, go = held
    service = Service(options(adapters["recurrent"]))
    app = make_app(service)

    async def asks() -> Reply:
        async with service.running():
            path = PREDICT.format("recurrent")
            first = asyncio.create_task(ask(app, path, {"row": "a"}))
            await asyncio.to_thread(running.wait, 60)
            gone = await ask(app, path, {"row": "b"}, gone=True)
            assert service.batcher.rows == 1
            go.set()
            await first
            return gone

    assert asyncio.run(asks()).status == 499
    assert service.batcher.rows == 0


def test_a_pass_that_fails_tells_clients_nothing_of_it(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret inside")

    monkeypatch.setattr(SharedEncoder, "run", fail)
    reply = one(adapters, PREDICT.format("recurrent"), {"row": "a"})
    assert (reply.status, reply.tree) == (500, {"detail": "this server failed: its log says why"})


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer guess"}, 401),
        ({"authorization": "Basic s3"}, 401),
        ({"authorization": "Bearer s3"}, 200),
        ({"authorization": "bearer s3"}, 200),
    ],
)
def test_the_token_opens(
    adapters: dict[str, Path], given: dict[str, str], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def asks(app: Any) -> list[Reply]:
        paths = [("/v1/adapters", None), ("/metrics", None), (PREDICT.format("recurrent"), {"row": "a"})]
        found = [await ask(app, path, tree, **given) for path, tree in paths]
        return [
            *found,
            await ask(app, "/healthz"),
            await ask(app, "/readyz"),
            await ask(app, "/openapi.json"),
        ]

    *closed, health, ready, described = answered(adapters, asks, token="s3")
    assert {reply.status for reply in closed} == {status}
    assert (health.status, ready.status, described.status) == (200, 200, 200)
    assert "s3" not in caplog.text + repr(options(token="s3"))


def test_adapters_are_listed_with_what_they_read(adapters: dict[str, Path]) -> None:
    listed = one(adapters, "/v1/adapters").tree
    assert "/" not in listed["encoder"]
    found = {each["name"]: each for each in listed["adapters"]}
    assert list(found) == ["gated", "recurrent", "residual"]
    assert found["gated"] == {
        "name": "gated",
        "task": "pair",
        "kind": "classification",
        "columns": ["one", "two"],
        "labels": ["no", "maybe", "yes"],
        "method": "gpc",
        "cell": "gated",
        "prompt_tokens": 4,
        "first_layer": 0,
        "text_tokens": 32,
        "version": read_card(adapters["gated"]).weights_sha256,
    }


def test_requests_are_counted_by_adapters_that_there_are(adapters: dict[str, Path]) -> None:
    async def asks(app: Any) -> str:
        for name in ("recurrent", "recurrent", "made-up"):
            await ask(app, PREDICT.format(name), {"row": "a"})
        return (await ask(app, "/metrics")).body.decode()

    lines = answered(adapters, asks).splitlines()
    assert 'gpc_dist_requests_total{adapter="recurrent",status="200"} 2.0' in lines
    assert 'gpc_dist_requests_total{adapter="",status="404"} 1.0' in lines
    assert {"gpc_dist_rows_total 2.0", "gpc_dist_adapters 3.0", "gpc_dist_rows_in_work 0.0"} <= set(lines)


def test_what_does_not_run_is_not_ready(adapters: dict[str, Path]) -> None:
    app = make_app(Service(options(adapters["recurrent"])))
    assert asyncio.run(ask(app, "/readyz")).status == 503
    assert asyncio.run(ask(app, "/healthz")).status == 200


def test_the_openapi_page_describes_requests_and_refusals(adapters: dict[str, Path]) -> None:
    tree = one(adapters, "/openapi.json").tree
    described = tree["paths"]["/v1/adapters/{name}/predict"]["post"]
    schema = described["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == {"rows", "row"}
    assert {"200", "401", "404", "413", "422", "429", "504"} <= set(described["responses"])
