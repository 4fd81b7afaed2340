"""What does a process send in an optimizer step, and how long does that take?

Collectives are rings: to gather or to reduce and scatter S bytes over n processes each sends (n - 1) / n S, to
all-reduce them twice that (Patarasu and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002). With G bytes of gradients, W of
divided base weights, a micro-batches a step, and a (reached) share r of the blocks in the backward pass:

    ddp       all-reduce of G, once a step
    fsdp2     gather of W forward, of r W backward, each micro-batch; reduce and scatter of G once a step
    hsdp      the same within a node; then an all-reduce of each process's share of G between the nodes
    zero1     reduce and scatter of G and gather of the adapter, once a step
    zero2     the same, the first of them each micro-batch
    zero3     gather of W forward, of r W backward, reduce and scatter of G, each micro-batch

G is that of the active players under DDP and FSDP2, an expected value under CopRA; ZeRO's states are flat, so all of it
travels. What stands in no block is gathered once a micro-batch by FSDP2, and twice by ZeRO-3.

Time of a ring: its bytes at the speed of its slowest link, and a latency for each of its n - 1 hops (NCCL's own model,
tuning.cc). A ring over nodes uses all their network adapters; rings of `hsdp` between nodes share them.

Source: ZeRO (arXiv 1910.02054), section 7; FSDP (arXiv 2304.11277).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from copra_llm.plan.cluster import ClusterSettings
from copra_llm.plan.expected import Participation
from copra_llm.plan.layout import Layout
from copra_llm.plan.memory import gathered_width
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
    between: bool = False
    """Whether its hops are between nodes alone."""

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


def all_gradients(sizes: Sizes, at: Layout) -> float:
    """Bytes of the gradients of all players, and of what is no player."""
    return at.gradient_width * sizes.trained_params


def active_gradients(sizes: Sizes, at: Layout, share: Participation) -> float:
    """Expected bytes of the gradients of the active players, and of what is no player."""
    always = sizes.trained_params - sizes.block_trained
    return at.gradient_width * (always + share.active * sizes.block_trained)


def _rings(at: Layout, sizes: Sizes, share: Participation, accumulation: int) -> Iterable[Ring]:
    n, m, blocks = at.processes, at.per_node, len(sizes.block_bytes)
    active = active_gradients(sizes, at, share)
    if at.backend == "ddp":
        yield Ring("gradients", ALL_REDUCE, active, n, 1)
        return
    if at.divides_base:
        yield from _gathers(at, sizes, share, accumulation)
    if at.fsdp:
        yield Ring("gradients", REDUCE_SCATTER, active, at.share, 1, share.active * blocks)
        if at.backend == "hsdp":
            yield Ring("gradients", ALL_REDUCE, active / m, at.nodes, 1, share.active * blocks, between=True)
        return
    yield Ring("gradients", REDUCE_SCATTER, all_gradients(sizes, at), n, 1 if at.backend == "zero1" else accumulation)
    if at.backend != "zero3":
        yield Ring("adapter", GATHER, at.trained_width * sizes.trained_params, n, 1)


def _gathers(at: Layout, sizes: Sizes, share: Participation, accumulation: int) -> Iterable[Ring]:
    width, blocks = gathered_width(at, sizes), len(sizes.block_bytes)
    inside = sum(sizes.block_bytes.values()) * width
    passes = accumulation * (1 + share.reached)
    yield Ring("weights", GATHER, inside, at.share, passes, blocks)
    yield Ring("weights", GATHER, sizes.rest_bytes * width, at.share, accumulation * (1 if at.fsdp else 2))


def _host(at: Layout, sizes: Sizes, share: Participation, accumulation: int) -> float:
    if at.offload is None:
        return 0.0
    # Gradients go down, what the optimizer has made of them comes up.
    steps = (at.gradient_width + at.trained_width) * sizes.trained_params / at.share
    if at.offload == "optimizer":
        return steps
    return steps + accumulation * (1 + share.reached) * sizes.base_bytes * gathered_width(at, sizes) / at.share


def seconds(flow: Traffic, at: Layout, cluster: ClusterSettings) -> float:
    """Time of a step's communication, if nothing else went on."""
    return sum(_ring_seconds(ring, at, cluster) for ring in flow.rings) + flow.host / cluster.host_bandwidth


def _ring_seconds(ring: Ring, at: Layout, cluster: ClusterSettings) -> float:
    if ring.between:
        hops, speed = (ring.processes - 1) * cluster.inter_node_latency, cluster.inter_node_bandwidth / at.per_node
    else:
        nodes = at.nodes if ring.processes > at.per_node else 1
        within = ring.processes - nodes
        hops = (nodes - 1) * cluster.inter_node_latency + within * cluster.intra_node_latency
        links = [cluster.intra_node_bandwidth] if within else []
        speed = min([*links, cluster.inter_node_bandwidth] if nodes > 1 else [cluster.intra_node_bandwidth])
    return ring.sent / speed + ring.calls * ring.parts * ring.rounds * hops
