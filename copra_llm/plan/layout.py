"""Which types, and which parts of a model, does each backend hold on a process?

DDP trains the adapter in the type that PEFT gives it, float32; mixed precision is then autocast. FSDP2 gathers weights
and divides gradients in bfloat16 under mixed precision, and keeps its shards as they were. ZeRO turns the whole model
into bfloat16 and keeps a float32 copy of what is trained with the optimizer's states (ZeRO, arXiv 1910.02054,
section 3.1: K = 12 bytes a parameter).
"""

from __future__ import annotations

from dataclasses import dataclass

from copra_llm.errors import InputError
from copra_llm.plan.cluster import DIVIDES_BASE, ClusterSettings
from copra_llm.plan.sizes import Sizes
from copra_llm.settings import ModelSettings


@dataclass(frozen=True)
class Layout:
    """One backend on one cluster."""

    backend: str
    processes: int
    """All of them."""
    per_node: int
    nodes: int
    share: int
    """Processes that what is divided is divided over; 1: nothing is."""
    mixed: bool
    """Mixed precision in 16 bits."""
    offload: str | None

    @property
    def zero(self) -> bool:
        return self.backend.startswith("zero")

    @property
    def fsdp(self) -> bool:
        return self.backend in ("fsdp2", "hsdp")

    @property
    def divides_base(self) -> bool:
        return self.backend in DIVIDES_BASE

    @property
    def casts(self) -> bool:
        """Whether it computes with weights in 16 bits, whatever their own type."""
        return self.mixed and (self.zero or self.fsdp)

    @property
    def trained_width(self) -> int:
        """Bytes of a trained entry where it is kept between steps."""
        return 2 if self.zero and self.mixed else 4

    @property
    def gradient_width(self) -> int:
        """Bytes of a gradient's entry on its way to other processes."""
        return 2 if self.casts else 4


def layout(backend: str, cluster: ClusterSettings, mixed: bool) -> Layout:
    """The layout of one of `--backend`'s names."""
    n, m = cluster.processes, cluster.processes_per_node
    share = {"ddp": 1, "hsdp": m}.get(backend, n)
    return Layout(backend, n, m, cluster.num_nodes, share, mixed, cluster.offload)


def refuse(at: Layout, sizes: Sizes, model: ModelSettings, quant_storage: str) -> None:
    """Refuse what a backend cannot do.

    Raises:
        InputError: for a quantised base that cannot be divided, or more processes than a weight has rows.
    """
    if not at.divides_base:
        return
    if model.load_in_8bit:
        raise InputError(f"--load_in_8bit is not for --backend {at.backend}, which would have to divide 8-bit weights "
                         "and their scales; give --load_in_4bit, or ddp")  # fmt: skip
    if model.load_in_4bit and quant_storage != model.dtype:
        raise InputError(f"--backend {at.backend} divides 4-bit weights only if they are packed in the base's type, "
                         f"but --bnb_4bit_quant_storage is {quant_storage}; make it {model.dtype}")  # fmt: skip
    if at.share > sizes.largest_rows:
        raise InputError(f"--backend {at.backend} would divide weights over {at.share} processes, but the longest "
                         f"has {sizes.largest_rows} rows; give fewer processes, or hsdp")  # fmt: skip
