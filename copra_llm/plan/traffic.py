"""What does a process send in an optimizer step, and how long does that take?

Collectives are rings: to gather or to reduce and scatter S bytes over n processes each sends (n - 1) / n S, to
all-reduce them twice that (Patarasu and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002). With G bytes of gradients, W of
divided base weights, a micro-batches a step, and a (reached) share r of the blocks in the backward pass:

    ddp       all-reduce of G, once a step
    fsdp2     the same; gather of W forward, of r W backward, each micro-batch
    hsdp      the same, gathers within a node
    zero1     all-reduce of G and gather of the adapter, once a step
    zero2     the same, the first of them each micro-batch
    zero3     gather of W and adapter forward, of r of them backward, reduce and scatter of G, each micro-batch

G is that of the active players, an expected value under CopRA: the loop sends no more under DDP and FSDP2
(`exchange.py`), and DeepSpeed reduces a gradient when it is there (0.19: stages 1 and 2 all-reduce what each process
then keeps its part of, `use_multi_rank_bucket_allreduce`). What ZeRO-1 and 2 gather are flat vectors, all of the
adapter. ZeRO-3 gathers the adapter's tensors of at most 1e5 entries once a step. What stands in no block is gathered in
both passes too, by ZeRO-3 always; of a base below 1e9 entries ZeRO-3 may keep all for the backward pass and send half.

Time of a ring: its bytes at the speed of its slowest link, and a latency for each of its n - 1 hops (NCCL's own model,
tuning.cc). A ring over nodes uses all their network adapters.

Source: ZeRO (arXiv 1910.02054), section 7; FSDP (arXiv 2304.11277).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from copra_llm.plan.cluster import ClusterSettings
from copra_llm.plan.expected import Participation
from copra_llm.plan.layout import Layout
from copra_llm.plan.memory import PERSISTS
from copra_llm.plan.sizes import Sizes

ALL_REDUCE, GATHER, REDUCE_SCATTER = 2, 1, 1
"""Rounds of a ring."""


@dataclass(frozen=True)
class Ring:
    """One kind of collective in a step."""

    what: str
    rounds: int
    """1, or 2 of an all-reduce."""
    size: float
    """Bytes S of the whole, of one call."""
    processes: int
    calls: float
    """Calls a step; an expected value where masks decide."""
    parts: float = 1.0
    """Collectives that a call consists of: one a block."""

    @property
    def sent(self) -> float:
        """Bytes that a process sends in a step."""
        return self.calls * self.rounds * (self.processes - 1) / self.processes * self.size


@dataclass(frozen=True)
class Traffic:
    """Of one process in an optimizer step."""

    rings: tuple[Ring, ...]
    host: float
    """Bytes between device and host."""

    def sent(self, *whats: str) -> float:
        """Bytes sent, of all kinds or of the named ones."""
        return sum(ring.sent for ring in self.rings if not whats or ring.what in whats)


def traffic(at: Layout, sizes: Sizes, share: Participation, accumulation: int) -> Traffic:
    """What a process sends.

    Args:
        at: backend and cluster.
        sizes: of base and adapter.
        share: of adapter and blocks that take part.
        accumulation: micro-batches of a step.
    """
    return Traffic(tuple(r for r in _rings(at, sizes, share, accumulation) if r.processes > 1),
                   _host(at, sizes, share, accumulation))  # fmt: skip


def active_gradients(sizes: Sizes, share: Participation) -> float:
    """Expected bytes of the gradients of the active players, and of what is no player."""
    always = sizes.trained_params - sizes.block_trained
    return 4.0 * (always + share.active * sizes.block_trained)


def _rings(at: Layout, sizes: Sizes, share: Participation, accumulation: int) -> Iterable[Ring]:
    n, active = at.processes, active_gradients(sizes, share)
    if at.divides_base:
        yield from _gathers(at, sizes, share, accumulation)
    if at.backend == "zero3":
        yield Ring("gradients", REDUCE_SCATTER, active, n, accumulation)
        yield from _gathers_of_adapter(at, sizes, share, accumulation)
        return
    yield Ring("gradients", ALL_REDUCE, active, n, accumulation if at.backend == "zero2" else 1)
    if at.zero:
        yield Ring("adapter", GATHER, 4.0 * sizes.trained_params, n, 1)


def _gathers(at: Layout, sizes: Sizes, share: Participation, accumulation: int) -> Iterable[Ring]:
    passes = accumulation * (1 + share.reached)
    yield Ring("weights", GATHER, sum(sizes.divided_blocks), at.share, passes, len(sizes.divided_blocks))
    yield Ring("weights", GATHER, sizes.divided_rest, at.share, 2 * accumulation if at.zero else passes)


def _gathers_of_adapter(at: Layout, sizes: Sizes, share: Participation, accumulation: int) -> Iterable[Ring]:
    small = sum(n for n in sizes.trained if n <= PERSISTS)
    yield Ring("adapter", GATHER, 4.0 * small, at.processes, 1)
    # Not apart from the weights of their blocks: they wait for no latency of their own.
    large = accumulation * share.active * 2
    yield Ring("adapter", GATHER, 4.0 * (sizes.trained_params - small), at.processes, large, 0)


def _host(at: Layout, sizes: Sizes, share: Participation, accumulation: int) -> float:
    if at.offload is None:
        return 0.0
    return accumulation * (1 + share.reached) * sizes.divided_bytes / at.share


def seconds(flow: Traffic, at: Layout, cluster: ClusterSettings) -> float:
    """Time of a step's communication, if nothing else went on."""
    return sum(_ring_seconds(ring, at, cluster) for ring in flow.rings) + flow.host / cluster.host_bandwidth


def _ring_seconds(ring: Ring, at: Layout, cluster: ClusterSettings) -> float:
    nodes = at.nodes if ring.processes > at.per_node else 1
    within = ring.processes - nodes
    hops = (nodes - 1) * cluster.inter_node_latency + within * cluster.intra_node_latency
    links = [cluster.intra_node_bandwidth] if within else []
    speed = min([*links, cluster.inter_node_bandwidth] if nodes > 1 else [cluster.intra_node_bandwidth])
    return ring.sent / speed + ring.calls * ring.parts * ring.rounds * hops
