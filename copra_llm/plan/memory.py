"""What does a process hold in memory, part by part?

With T trained entries, n processes, and what a backend divides divided over s of them:

    part               ddp        fsdp2, hsdp     zero1     zero2     zero3
    base weights W     W          W / s           W         W         W / s
    adapter            4 T        4 T / s         w T       w T       w T (small tensors whole, else / s)
    gradients          4 T        4 T / s         w T       w T / s   w T / s
    AdamW's states     8 T        8 T / s         12 T / s  12 T / s  12 T / s

w is 2 bytes under mixed precision, else 4 (`layout.py`). FSDP2's gradients stay whole between the micro-batches of a
step. Communication needs buffers: DDP's buckets are a copy of the gradients (PyTorch's DDP, `gradient_as_bucket_view`);
FSDP2 holds what stands in no block, and two blocks, the one at work and the next; ZeRO-2 and 3 hold two reduce buckets
of 5e8 entries, ZeRO-3 besides up to 1e9 gathered entries and 5e7 on their way (DeepSpeed's defaults:
`reduce_bucket_size` with `overlap_comm`, `stage3_max_live_parameters`, `stage3_prefetch_bucket_size`), each no more
than there is to put in.

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
"""ZeRO-3 leaves tensors with fewer entries whole (`stage3_param_persistence_threshold`)."""


@dataclass(frozen=True)
class Memory:
    """Of one process at its worst moment, in bytes."""

    base_weights: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    """What the backward pass needs, when the forward pass of the blocks has ended."""
    logits: float
    """Held beyond that at the worst moment: logits, temporary results, unpacked weights."""
    buffers: float
    """Of communication."""
    host: float
    """In the host's memory."""

    @property
    def total(self) -> float:
        """On the device."""
        return sum(value for name, value in vars(self).items() if name != "host")


def memory(at: Layout, sizes: Sizes, work: Work, accumulation: int, width: int) -> Memory:
    """Memory of a process.

    Args:
        at: backend and cluster.
        sizes: of base and adapter.
        work: of a micro-batch.
        accumulation: micro-batches of a step.
        width: bytes of an entry that is computed with.
    """
    T, s = sizes.trained_params, at.share
    base = sizes.base_bytes * (gathered_width(at, sizes) if at.zero else 1.0)
    if at.divides_base:
        base /= s
    adapter = at.trained_width * T / (s if at.fsdp else 1)
    if at.backend == "zero3":
        adapter = at.trained_width * sum(n if n < PERSISTS else n / s for n in sizes.trained)
    gradients = at.trained_width * T / (1 if at.backend in ("ddp", "zero1") else s)
    if at.fsdp and accumulation > 1 and s > 1:
        gradients += 4 * T
    states = (12 if at.zero else 8) * T / (1 if at.backend == "ddp" else s)
    host = 0.0
    if at.offload == "optimizer":
        host, states = states, 0.0
    elif at.offload == "all":
        host, base, states = base + states, 0.0, 0.0
        if at.fsdp:
            host, adapter, gradients = host + adapter + gradients, 0.0, 0.0
    unpacked = width * sizes.largest_matrix
    return Memory(base, adapter, gradients, states, work.kept, work.beyond + unpacked, _buffers(at, sizes), host)


def gathered_width(at: Layout, sizes: Sizes) -> float:
    """Bytes that the base takes when it is gathered, relative to those in its own type."""
    # Only float32 shrinks: quantised weights and those of 16 bits stay as they are.
    return 0.5 if at.casts and sizes.base_bytes == 4 * sizes.base_params else 1.0


def _buffers(at: Layout, sizes: Sizes) -> float:
    T = sizes.trained_params
    if at.processes == 1 or at.backend == "zero1":
        return 0.0
    if at.backend == "ddp":
        return 4.0 * T
    bucket = 2 * at.gradient_width * min(REDUCE_BUCKET, T)
    if at.backend == "zero2":
        return bucket
    of_entry = gathered_width(at, sizes)
    largest = max(sizes.block_bytes.values()) * of_entry
    if at.fsdp:
        return sizes.rest_bytes * of_entry + 2 * largest + at.gradient_width * T / len(sizes.block_bytes)
    per_entry = sizes.base_bytes * of_entry / sizes.base_params
    return bucket + per_entry * min(LIVE + PREFETCH, sizes.base_params)
