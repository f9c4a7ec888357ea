"""Figures of a server, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from gpc_dist.inference.server.encoder import Row

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters and histograms of one process.

    Args:
        rows: gives the number of rows in work.
        adapters: gives the number of adapters.
    """

    def __init__(self, rows: Callable[[], int], adapters: Callable[[], int]):
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "gpc_dist_requests", "Requests by adapter and status.", ["adapter", "status"], registry=registry
        )
        self._request_s = Histogram(
            "gpc_dist_request_seconds",
            "From a request's first byte to its answer.",
            ["adapter"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._rows = Counter("gpc_dist_rows", "Rows that passes have run.", registry=registry)
        self._pass_s = Histogram(
            "gpc_dist_pass_seconds", "Duration of a pass.", buckets=_SECONDS, registry=registry
        )
        self._pass_rows = Histogram(
            "gpc_dist_pass_rows", "Rows of a pass.", buckets=_COUNTS, registry=registry
        )
        self._pass_adapters = Histogram(
            "gpc_dist_pass_adapters", "Adapters that share a pass.", buckets=_COUNTS, registry=registry
        )
        self._reloads = Counter(
            "gpc_dist_adapters_taken_up", "Adapters that --reload has taken up.", registry=registry
        )
        in_work = Gauge("gpc_dist_rows_in_work", "Rows that wait or run.", registry=registry)
        in_work.set_function(rows)
        loaded = Gauge("gpc_dist_adapters", "Adapters that are loaded.", registry=registry)
        loaded.set_function(adapters)

    def request(self, adapter: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            adapter: its name, which must be one of the server's: whoever asks could make up any number.
        """
        self._requests.labels(adapter, str(status)).inc()
        self._request_s.labels(adapter).observe(seconds)

    def one_pass(self, rows: Sequence[Row], seconds: float) -> None:
        """Count a pass."""
        self._rows.inc(len(rows))
        self._pass_s.observe(seconds)
        self._pass_rows.observe(len(rows))
        self._pass_adapters.observe(len({id(row.adapter) for row in rows}))

    def taken_up(self, adapters: int) -> None:
        self._reloads.inc(adapters)

    def text(self) -> bytes:
        """All figures, in Prometheus' text format."""
        return generate_latest(self._registry)
