"""Which parts of a model does each backend hold on a process, and what does it refuse?

    ddp       all of it
    fsdp2     the base divided over all processes, but for quantised weights; the adapter, its gradients and optimizer
              states whole (`sharded.py`)
    hsdp      the same, the base divided over the processes of a node alone
    zero1     all of it, the optimizer's states divided
    zero2     gradients too
    zero3     base and adapter too

The adapter is float32, as PEFT makes it, and so are its gradients and, with ZeRO, the copy that the optimizer steps;
mixed precision is autocast with every backend. So the base keeps its own type where it is divided and gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.plan.cluster import DIVIDES_BASE, ClusterSettings
from copra_llm.plan.sizes import Sizes
from copra_llm.zero import check_run


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
    offload: str | None

    @property
    def zero(self) -> bool:
        return self.backend.startswith("zero")

    @property
    def divides_base(self) -> bool:
        return self.backend in DIVIDES_BASE

    @property
    def calls_pieces(self) -> bool:
        """Whether adapted layers run as PEFT has them: the hooks by which ZeRO-3 gathers want each piece called."""
        return self.backend == "zero3"


def layout(backend: str, cluster: ClusterSettings) -> Layout:
    """The layout of one of `--backend`'s names."""
    n, m = cluster.processes, cluster.processes_per_node
    share = {"ddp": 1, "hsdp": m}.get(backend, n)
    return Layout(backend, n, m, cluster.num_nodes, share, cluster.offload)


def refuse(at: Layout, sizes: Sizes, run: RunConfig) -> None:
    """Refuse what the loop refuses, and what cannot be divided.

    Raises:
        InputError: for settings that a backend cannot honour, or more processes than a weight has rows.
    """
    if at.backend == "zero3" and run.model.load_in_4bit:
        raise InputError("--load_in_4bit and ZeRO-3 train together, but how 4-bit weights are divided there is not "
                         "counted; plan with --backend fsdp2 or zero2")  # fmt: skip
    if at.zero:
        check_run(run, int(at.backend[-1]))
    elif at.share > sizes.largest_rows:
        raise InputError(f"--backend {at.backend} divides weights by rows over {at.share} processes, but the longest "
                         f"has {sizes.largest_rows}; give fewer processes, or ddp")  # fmt: skip
