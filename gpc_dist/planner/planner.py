"""Memory, traffic and time of a run in every regime, and which regime to take.

Computed from a `Workload`; times are those of `timing`. Bytes of one rank, with A trained values, W ranks and an
encoder of N parameters of e bytes, of which V are in the token table:

    frozen       e N; at ZeRO-3 e (V + (N - V) / W), and e V with offload; hpZ: a second shard, of the ranks of a
                 node; int8: one byte for each value of a layer's matrix and 4 for each row, or in a shard e for each
                 256 values; with a late prompt of both halves, because text states may have to be computed
    gathered     ZeRO-3 on several ranks: DeepSpeed keeps a layer that is used again within
                 `stage3_max_reuse_distance` parameters, so k = ceil(distance / 2 / layer) layers stay from the
                 forward to the backward pass. Beside them one layer runs, and others are prefetched in buckets
                 of b = `stage3_prefetch_bucket_size` parameters, first in the buffer of the collective (gloo has
                 one of its own besides) and then as tensors. Every layer requests another bucket, so early in
                 the forward pass (1 - layer / b) of the encoder may be prefetched, when there are few
                 activations; the larger of both moments counts
    activations  what the forward pass leaves for the backward pass (dry run)
    trained      values, gradients and the optimizer's moments, in float32: 4 A + 4 A + 8 A for AdamW, the moments
                 at stages 1 to 3 of a rank's own tensors only
    workspace    the rest of the dry run's peak; with int8 the matrix in use, in the encoder's type; on a CPU 24 MiB
                 for buffers of libraries

A regime fits if these leave 10 % of the device free for its context, the buffers of NCCL and of the matrix library,
and the allocator's fragmentation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gpc_dist.encoder.quantize import SHARD_GROUP
from gpc_dist.planner.devices import GIB
from gpc_dist.planner.dry_run import Footprint
from gpc_dist.planner.regime import Regime
from gpc_dist.planner.timing import Cluster
from gpc_dist.planner.workload import Weights, Workload

HEAD_ROOM = 0.1
_MOST_ROWS = 2**16
_TIE = 1.02
_FLOAT = 4
_CPU_BYTES = 24 * 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank's device, see the module's docstring."""

    frozen: float
    gathered: float
    activations: float
    trained: float
    workspace: float

    @property
    def total(self) -> float:
        return self.frozen + self.gathered + self.activations + self.trained + self.workspace


@dataclass(frozen=True)
class Estimate:
    """Memory, traffic and speed of a regime on a cluster."""

    regime: Regime
    memory: Memory
    """At `micro_rows`, or at one row if none fits."""
    host_bytes: float
    """Of one node: frozen weights kept there."""
    sent_bytes: float
    """Bytes that a rank receives from others in a step."""
    rows: int
    """Of a rank in a step."""
    micro_rows: int
    """Of a pass."""
    most_rows: int
    """Largest micro-batch that fits; 0 if none does."""
    step_s: float
    communication_share: float
    """Share of the step that communication takes and computation does not hide."""
    mfu: float
    rows_per_s: float
    """Of all ranks."""

    @property
    def fits(self) -> bool:
        return self.most_rows > 0


class Planner:
    """Estimates for one workload.

    Args:
        zero3: DeepSpeed's values of a ZeRO-3 run (`zero_optimization` of its configuration).
        table_on_device: whether the token table is on the device, or on the host.
    """

    def __init__(self, workload: Workload, zero3: Mapping[str, float], table_on_device: bool = True):
        self.workload = workload
        self.zero3 = zero3
        self.table_on_device = table_on_device

    def estimate(self, regime: Regime, cluster: Cluster, rows: int | None = None) -> Estimate:
        """Memory, traffic and time of a step.

        Args:
            rows: of a rank in a step; its share of the workload's when not given.
        """
        rows = rows or math.ceil(self.workload.rows / cluster.size)
        most = self._most_rows(regime, cluster)
        passes = math.ceil(rows / max(1, min(rows, most)))
        micro = math.ceil(rows / passes)
        memory = self.memory(regime, cluster, micro)
        computed_s, step_s = self._seconds(regime, cluster, rows, passes)
        flops = self.workload.passes.kept.at(rows).flops
        return Estimate(
            regime=regime,
            memory=memory,
            host_bytes=self._host_bytes(regime, cluster),
            sent_bytes=self._sent_bytes(regime, cluster, passes),
            rows=rows,
            micro_rows=micro,
            most_rows=most,
            step_s=step_s,
            communication_share=1 - computed_s / step_s,
            mfu=flops / step_s / (cluster.device.peak_tflops * 1e12),
            rows_per_s=rows * cluster.size / step_s,
        )

    def memory(self, regime: Regime, cluster: Cluster, rows: int) -> Memory:
        """Bytes of a rank's device at the peak of a pass over `rows` rows."""
        pass_ = self._footprint(regime, rows)
        gradients = _FLOAT * self.workload.adapter
        workspace = max(0.0, pass_.peak - pass_.saved - gradients)
        if regime.quantize == "int8" and regime.zero_stage < 3:
            workspace += self.workload.weights.largest_matrix * self.workload.weights.element_bytes
        if cluster.device.is_cpu:
            workspace += _CPU_BYTES
        halves = [half for half in (self.workload.weights, self.workload.lower) if half is not None]
        return Memory(
            frozen=sum(self._frozen(half, regime, cluster) for half in halves),
            gathered=self._gathered(regime, cluster, pass_.saved, workspace),
            activations=pass_.saved,
            trained=2 * gradients + self._moments(regime, cluster.size),
            workspace=workspace,
        )

    def _footprint(self, regime: Regime, rows: float) -> Footprint:
        return self.workload.passes.of(regime.zero_stage == 3, regime.recompute).at(rows)

    def _frozen(self, weights: Weights, regime: Regime, cluster: Cluster) -> float:
        table = (weights.table if self.table_on_device else 0) * weights.element_bytes
        if regime.zero_stage == 3:
            resident = self._resident(weights) * weights.element_bytes
            shards = 0.0 if regime.offload != "none" else self._shards(weights, regime, cluster)
            return table + resident + shards
        if regime.quantize == "int8":
            plain = weights.body - weights.matrices
            return table + plain * weights.element_bytes + weights.matrices + _FLOAT * weights.matrix_rows
        return table + weights.body * weights.element_bytes

    def _resident(self, weights: Weights) -> int:
        """Parameters that every rank keeps whole at ZeRO-3."""
        return weights.persistent(int(self.zero3["stage3_param_persistence_threshold"]))

    def _shards(self, weights: Weights, regime: Regime, cluster: Cluster) -> float:
        """Bytes of a rank's shards, beside what is resident."""
        sharded = weights.body - self._resident(weights)
        size: float = sharded * weights.element_bytes
        if regime.quantize == "int8":
            matrices = min(weights.matrices, sharded)
            size -= matrices * (weights.element_bytes - _int8_bytes(weights))
        return size / cluster.size + (size / cluster.per_node if regime.hpz else 0.0)

    def _gathered(self, regime: Regime, cluster: Cluster, saved: float, workspace: float) -> float:
        """Bytes beside the `saved` ones of a whole forward pass. Of those gathered earlier, the excess over the
        activations that do not exist yet counts."""
        if not self._gathers(regime, cluster.size):
            return 0.0
        weights, size = self.workload.weights, self.workload.weights.element_bytes
        bucket = min(max(self.zero3["stage3_prefetch_bucket_size"], weights.layer), weights.body)
        reused = self._reused(regime, cluster.size)
        running = (reused + 1) * weights.layer
        ahead = weights.body * (1 - weights.layer / bucket)
        beginning = min(max(running, ahead) + bucket, weights.body) + bucket
        if cluster.device.is_cpu:
            beginning += bucket
        if reused < weights.layers:
            turning = (min(running + bucket, weights.body) + bucket) * size
        else:  # the last buffer is freed when the last layer begins
            buffer = (weights.body - weights.layer) % bucket
            turning = weights.body * size + max(0.0, buffer * size - saved / weights.layers)
        return max(turning, beginning * size - saved - workspace)

    def _gathers(self, regime: Regime, ranks: int) -> bool:
        shards = regime.zero_stage == 3 and self.workload.weights.layers > 0
        return shards and (ranks > 1 or regime.offload != "none" or regime.quantize != "none")

    def _reused(self, regime: Regime, ranks: int) -> int:
        """k: layers that are gathered once for the forward and the backward pass."""
        weights = self.workload.weights
        kept = math.ceil(self.zero3["stage3_max_reuse_distance"] / 2 / weights.layer)
        return min(kept, weights.layers) if self._gathers(regime, ranks) else 0

    def _moments(self, regime: Regime, ranks: int) -> float:
        tensors = self.workload.adapter_tensors
        values: float = sum(tensors)
        if regime.zero_stage > 0:
            # a tensor is not divided, so one rank has at least the largest
            values = max(max(tensors), values / ranks)
        return _FLOAT * self.workload.moments * values

    def _host_bytes(self, regime: Regime, cluster: Cluster) -> float:
        weights = self.workload.weights
        table = 0 if self.table_on_device else weights.table
        shards = self._shards(weights, regime, cluster) * cluster.per_node if regime.offload == "cpu" else 0.0
        return table * weights.element_bytes + shards

    def _most_rows(self, regime: Regime, cluster: Cluster) -> int:
        usable = cluster.device.memory_gib * GIB * (1 - HEAD_ROOM)

        def fits(rows: int) -> bool:
            return self.memory(regime, cluster, rows).total <= usable

        low, high = 0, _MOST_ROWS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def _sent_bytes(self, regime: Regime, cluster: Cluster, passes: int) -> float:
        others = (cluster.size - 1) / cluster.size
        weights, trained = self.workload.weights, _FLOAT * self.workload.adapter
        sent = 2 * others * trained
        if regime.zero_stage > 0:
            sent += others * trained  # the owners' updates
        if self._gathers(regime, cluster.size):
            layers = 2 * weights.layers - self._reused(regime, cluster.size)
            size = _sent_bytes_of_a_value(weights, regime) * weights.layer
            within = _gathering(regime, cluster).size
            sent += passes * layers * (within - 1) / within * size
        return sent

    def _seconds(self, regime: Regime, cluster: Cluster, rows: int, passes: int) -> tuple[float, float]:
        """Seconds of a step without and with communication."""
        forward_s, backward_s = self._pass_seconds(regime, cluster, rows / passes)
        weights = self.workload.weights
        trained = _FLOAT * self.workload.adapter
        shared_s = cluster.reduce_s(trained)
        if regime.zero_stage > 0:
            owners = min(cluster.size, len(self.workload.adapter_tensors))
            shared_s += cluster.gather_s(trained, owners)
        computed_s = passes * (forward_s + backward_s)
        if not self._gathers(regime, cluster.size):
            return computed_s, computed_s + shared_s
        layer = weights.layer * _sent_bytes_of_a_value(weights, regime)
        layer_s = _gathering(regime, cluster).gather_s(layer)
        if regime.offload != "none":
            layer_s = max(layer_s, cluster.fetch_s(layer / cluster.size, regime.offload == "nvme"))
        back = weights.layers - self._reused(regime, cluster.size)
        pass_s = max(forward_s, layer_s * weights.layers) + max(backward_s, layer_s * back) + layer_s
        return computed_s, passes * pass_s + shared_s

    def _pass_seconds(self, regime: Regime, cluster: Cluster, rows: float) -> tuple[float, float]:
        """Seconds of computation of one pass, forward and backward."""
        weights, plain = self.workload.weights, self.workload.passes.kept.at(rows)
        read = weights.body * weights.element_bytes

        def seconds(flops: float, moved: float) -> float:
            launched_s = cluster.launch_s(plain.operators) / 2
            longest_s = max(cluster.arithmetic_s(flops), cluster.memory_s(moved), launched_s)
            return longest_s + self._written_out_s(regime, cluster)

        forward_s = seconds(plain.forward_flops, read + 2 * plain.saved)
        backward_s = seconds(plain.backward_flops, read + 3 * plain.saved)
        if regime.recompute:
            recomputed = self._footprint(regime, rows).backward_flops - plain.backward_flops
            backward_s += seconds(recomputed, read + 2 * plain.saved)
        return forward_s, backward_s

    def _written_out_s(self, regime: Regime, cluster: Cluster) -> float:
        if regime.quantize == "none":
            return 0.0
        return cluster.memory_s(
            self.workload.weights.matrices * (1 + 2 * self.workload.weights.element_bytes)
        )


def _gathering(regime: Regime, cluster: Cluster) -> Cluster:
    """The ranks that gather a layer from each other."""
    return replace(cluster, nodes=1) if regime.hpz else cluster


def _sent_bytes_of_a_value(weights: Weights, regime: Regime) -> float:
    return _int8_bytes(weights) if regime.quantize == "int8" else weights.element_bytes


def _int8_bytes(weights: Weights) -> float:
    return 1 + weights.element_bytes / SHARD_GROUP


def recommend(estimates: Sequence[Estimate]) -> Estimate | None:
    """The fastest that fits without offload, or else with it; the simplest of those that are as fast within 2 %. None
    if none fits."""
    fitting = [e for e in estimates if e.fits]
    if not fitting:
        return None
    # what offload costs depends on the host most, and is not measured
    fitting = [e for e in fitting if e.regime.offload == "none"] or fitting
    fastest = min(e.step_s for e in fitting)
    return min((e for e in fitting if e.step_s <= fastest * _TIE), key=lambda e: e.regime.simplicity)


def why(chosen: Estimate, estimates: Sequence[Estimate]) -> str:
    """Why this one of the estimates was recommended and no simpler one, in a phrase."""
    regime = chosen.regime
    whole = [e.step_s for e in estimates if e.fits and e.regime.zero_stage < 3]
    if regime.offload != "none":
        said = "fits with offload only"
    elif regime.zero_stage < 3:
        said = "fits whole, so nothing is gathered"
    elif whole:
        said = f"{min(whole) / chosen.step_s:.2f} times as fast as whole"
    else:
        said = "does not fit whole"
    said += "; gathers inside a node" * regime.hpz
    if regime.recompute:
        kept = any(e.fits and e.regime == replace(regime, recompute=False) for e in estimates)
        said += "; without recomputation " + ("in more passes" if kept else "too large")
    return said


def scaling(planner: Planner, regime: Regime, cluster: Cluster, nodes: Sequence[int]) -> list[Estimate]:
    """The same regime and the same rows on each rank, on more and more nodes."""
    rows = math.ceil(planner.workload.rows / cluster.size)
    return [planner.estimate(regime, replace(cluster, nodes=n), rows) for n in nodes]
