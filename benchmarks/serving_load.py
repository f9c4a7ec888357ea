"""Open-loop load for `serving.py`, from a process of its own: requests are sent when they are due, whatever became of
those before.

    python benchmarks/serving_load.py PLAN.json RESULT.json

The plan is that of `Plan`, as JSON; requests are due at times drawn from a Poisson process. A latency counts from when
the request was due, so that a server that keeps requests waiting cannot make the load lighter (coordinated omission).
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

_MOST_OPEN = 512
"""Requests that wait for an answer at once; beyond that the server has failed, and more would measure this process."""
_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Plan:
    urls: list[str]
    """Where to POST for each adapter; each request is for one of them at random."""
    key: str
    """What a body calls its rows: `rows` of this project's server, `dataframe_records` of MLflow's."""
    rate: float
    """Requests per second."""
    seconds: float
    seed: int
    texts: list[str]


async def _ask(
    session: aiohttp.ClientSession, url: str, body: Any, due_s: float, found: list[tuple[Any, float]]
) -> None:
    try:
        async with session.post(url, json=body) as reply:
            await reply.read()
            status: Any = reply.status
    except (aiohttp.ClientError, TimeoutError) as error:
        status = type(error).__name__
    found.append((status, time.perf_counter() - due_s))


async def offer(plan: Plan) -> dict[str, Any]:
    """Offer the load; returns what came of it."""
    draw = random.Random(plan.seed)
    found: list[tuple[Any, float]] = []
    late_s = dropped = 0.0
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        open_: set[asyncio.Task[None]] = set()
        start_s = due_s = time.perf_counter()
        while (due_s := due_s + draw.expovariate(plan.rate)) < start_s + plan.seconds:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            late_s = max(late_s, time.perf_counter() - due_s)
            if len(open_) >= _MOST_OPEN:
                dropped += 1
                continue
            body = {plan.key: [{"text": draw.choice(plan.texts)}]}
            task = asyncio.create_task(_ask(session, draw.choice(plan.urls), body, due_s, found))
            open_.add(task)
            task.add_done_callback(open_.discard)
        if open_:
            await asyncio.wait(open_)
    good = sorted(latency for status, latency in found if status == 200)
    return {
        "offered_per_s": (len(found) + dropped) / plan.seconds,
        "answered_per_s": len(good) / plan.seconds,
        "p50_ms": _quantile_ms(good, 0.50),
        "p99_ms": _quantile_ms(good, 0.99),
        "others": dict(Counter(str(status) for status, _ in found if status != 200)),
        "not_sent": int(dropped),
        "sent_late_ms": round(late_s * 1000, 1),
    }


def _quantile_ms(ordered: list[float], share: float) -> float | None:
    if not ordered:
        return None
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000, 1)


def main() -> None:
    plan, result = sys.argv[1:]
    found = asyncio.run(offer(Plan(**json.loads(Path(plan).read_text()))))
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
