"""What does a process hold in memory, part by part?

With a base of W bytes, T trained entries, n processes, and what a backend divides divided over s of them:

    part               ddp    fsdp2, hsdp   zero1     zero2     zero3
    base weights       W      W / s         W         W         W / s
    adapter            4 T    4 T           4 T       4 T       4 T (small tensors whole, else / s)
    gradients          4 T    4 T           4 T       4 T / s   4 T / s
    AdamW's states     8 T    8 T           12 T / s  12 T / s  12 T / s

FSDP2 leaves quantised weights whole. ZeRO's states have a copy of the adapter beside the two moments.

While a model computes, communication needs buffers. FSDP2 holds what stands in no block, and two blocks, the one at
work and the next. ZeRO holds a bucket of 5e8 gradient entries, however few there are, and stage 3 besides up to 1e9
gathered entries and 5e7 on their way (DeepSpeed 0.19's defaults, `reduce_bucket_size`, `stage3_max_live_parameters`,
`stage3_prefetch_bucket_size`), no more of these than the base has. Under DDP and FSDP2 gradients travel in one flat
copy after the backward pass, when activations are gone (`exchange.py`). Activations are at their most when no gradient
of the micro-batch exists yet, so gradients count beside them only where they wait for further micro-batches, or where
ZeRO keeps its part of them always.

A 4-bit or 8-bit layer's weight is unpacked for its product: the largest one counts as held.

Source: Rajbhandari et al., ZeRO (arXiv 1910.02054), section 3; ZeRO-Offload (arXiv 2101.06840); Zhao et al., PyTorch
FSDP (arXiv 2304.11277), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from copra_llm.plan.layout import Layout
from copra_llm.plan.sizes import Sizes
from copra_llm.plan.trace import Work

REDUCE_BUCKET, LIVE, PREFETCH = int(5e8), int(1e9), int(5e7)
"""DeepSpeed's defaults, in entries."""
PERSISTS = int(1e5)
"""ZeRO-3 leaves tensors with no more entries whole (`stage3_param_persistence_threshold`)."""


@dataclass(frozen=True)
class Memory:
    """Of one process at its worst moment, in bytes."""

    base_weights: float
    adapter: float
    gradients: float
    """When the backward pass has ended."""
    gradients_before: float
    """Of these, what there is already when it begins."""
    optimizer: float
    activations: float
    """What the backward pass needs, when the forward pass of the blocks has ended."""
    logits: float
    """Held beyond that at the worst moment: logits, temporary results, unpacked weights."""
    buffers: float
    """Of communication, while the model computes."""
    exchange: float
    """The flat copy of all gradients, after the backward pass."""
    host: float
    """In the host's memory."""

    @property
    def total(self) -> float:
        """On the device, at the worse of two moments: when the backward pass begins, or after it."""
        begins = self.activations + self.logits + self.buffers + self.gradients_before
        return self.between_steps + max(begins, self.gradients + self.exchange)

    @property
    def between_steps(self) -> float:
        """What a step finds and leaves behind."""
        return self.base_weights + self.adapter + self.optimizer


def memory(at: Layout, sizes: Sizes, work: Work, accumulation: int, width: int) -> Memory:
    """Memory of a process.

    Args:
        at: backend and cluster.
        sizes: of base and adapter.
        work: of a micro-batch.
        accumulation: micro-batches of a step.
        width: bytes of an entry of an unpacked weight.
    """
    T, s = sizes.trained_params, at.share
    base, host = float(sizes.base_bytes), 0.0
    if at.divides_base:
        divided = sizes.divided_bytes / s
        host, kept = (divided, 0.0) if at.offload == "base" else (0.0, divided)
        base = sizes.whole_bytes + kept
    adapter = 4.0 * T
    if at.backend == "zero3":
        adapter = 4.0 * sum(n if n <= PERSISTS else n / s for n in sizes.trained)
    parts = at.backend in ("zero2", "zero3")
    gradients = 4.0 * T / (s if parts else 1)
    before = gradients if parts or accumulation > 1 else 0.0
    states = 12.0 * T / s if at.zero else 8.0 * T
    exchange = 4.0 * T if at.processes > 1 and not at.zero else 0.0
    beyond = work.beyond + width * sizes.largest_matrix
    return Memory(base, adapter, gradients, before, states, work.kept, beyond, _buffers(at, sizes), exchange, host)


def _buffers(at: Layout, sizes: Sizes) -> float:
    bucket = 4.0 * REDUCE_BUCKET if at.zero else 0.0
    if not at.divides_base or at.share == 1:
        return bucket
    if at.backend == "zero3":
        return bucket + sizes.base_bytes / sizes.base_params * min(LIVE + PREFETCH, sizes.base_params)
    return sizes.divided_rest + 2.0 * max(sizes.divided_blocks)
