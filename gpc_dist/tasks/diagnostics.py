"""SuperGLUE's two diagnostics (Wang et al., 2019, section 3.3), which adapters of RTE answer.

AX-b is the broad-coverage set of GLUE, without its class `neutral`; AX-g is Winogender (Rudinger et al., 2018) as
entailment. Each is one file with labels, `test` on the Hub, and has no training rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from gpc_dist.tasks import metrics
from gpc_dist.tasks.benchmark import Spec, class_index
from gpc_dist.tasks.example import Example
from gpc_dist.tasks.formats import Row
from gpc_dist.tasks.superglue import RTE

_ANSWERED_BY = "rte"


def _axb(row: Row) -> Iterator[Example]:
    texts = (row["sentence1"], row["sentence2"])
    yield Example(row["idx"], (texts,), class_index(row, RTE))


def _axg(row: Row) -> Iterator[Example]:
    texts = (row["premise"], row["hypothesis"])
    # the two rows of a pair follow one another; not every copy of the data has `pair_id`
    yield Example(row["idx"], (texts,), class_index(row, RTE), group=row["idx"] // 2)


SPECS = {
    "axb": Spec(
        _axb,
        ("sentence1", "sentence2"),
        "classification",
        RTE,
        ("entailment", "not entailment"),
        {"matthews": metrics.matthews},
        answered_by=_ANSWERED_BY,
        file="AX-b.jsonl",
    ),
    "axg": Spec(
        _axg,
        ("premise", "hypothesis"),
        "classification",
        RTE,
        ("entailment", "not entailment"),
        {"accuracy": metrics.accuracy, "gender_parity": metrics.gender_parity},
        answered_by=_ANSWERED_BY,
        file="AX-g.jsonl",
    ),
}
