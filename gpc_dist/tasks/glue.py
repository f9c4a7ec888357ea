"""Two single-sentence tasks of GLUE (Wang et al., 2018, arXiv 1804.07461) as examples.

Rows may come from GLUE's TSV files that have a header (SST-2's), from JSON Lines files, or from `glue` on the Hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from gpc_dist.tasks import metrics
from gpc_dist.tasks.benchmark import Spec, class_index
from gpc_dist.tasks.example import Example
from gpc_dist.tasks.formats import Row

_COLA = ("unacceptable", "acceptable")
_SST2 = ("negative", "positive")


def _sentence(labels: tuple[str, ...], row: Row) -> Iterator[Example]:
    yield Example(row["idx"], ((row["sentence"], None),), class_index(row, labels))


SPECS = {
    "cola": Spec(
        partial(_sentence, _COLA),
        ("sentence",),
        "classification",
        _COLA,
        _COLA,
        {"matthews": metrics.matthews},
    ),
    "sst2": Spec(
        partial(_sentence, _SST2),
        ("sentence",),
        "classification",
        _SST2,
        _SST2,
        {"accuracy": metrics.accuracy},
    ),
}
