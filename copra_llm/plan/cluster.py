"""Which machines, and how is the run laid out over them?

Defaults describe a DGX H100, with what collectives and products achieve rather than what the data sheet promises:

- memory: 80 GB a GPU; 4 GB of it stay free for the CUDA context, NCCL and what fragmentation takes (an assumption);
- 400 TFLOP/s in bfloat16: what pre-training achieved on these GPUs (Llama 3, arXiv 2407.21783, table 4: 380 to 430),
  40 % of the peak of 989; a LoRA step of small matrices stays below;
- links: 80 % (an assumption) of 450 GB/s one way by NVLink, of 8 x 400 Gbit/s a node by InfiniBand, and of 64 GB/s to
  the host by PCIe 5 x16 (NVIDIA's data sheets of H100 and DGX H100);
- latencies: 3.4 and 14 microseconds a hop of a ring by NVLink and by network, as NCCL itself reckons (tuning.cc,
  hwLat, ring, simple protocol).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from copra_llm.errors import InputError, nearest
from copra_llm.settings import setting

BACKENDS = {
    "ddp": "a whole model on each process",
    "fsdp2": "the base divided over all processes",
    "hsdp": "the base divided within a node, copied over nodes",
    "zero1": "optimizer states divided",
    "zero2": "gradients and optimizer states divided",
    "zero3": "everything divided over all processes",
}
"""Names of `--backend`, and what each divides."""
NOT_YET = ("hsdp",)
"""Those that the training loop does not do: it gives FSDP2 no mesh of nodes (`sharded.py`). Named so where shown."""
DIVIDES_BASE = ("fsdp2", "hsdp", "zero3")
"""Those that divide the base's weights."""


@dataclass(frozen=True)
class ClusterSettings:
    backend: list[str] = setting(
        ["ddp"],
        f"One or several of {', '.join(BACKENDS)}: a column of the answer each. {', '.join(NOT_YET)}: on paper alone.",
    )
    num_nodes: int = setting(1, "Machines.")
    processes_per_node: int = setting(1, "Processes, each with a GPU, a machine.")
    offload: str | None = setting(
        None, "base: what FSDP2 or ZeRO-3 divides of it is kept in the host's memory; unset: nothing is."
    )
    num_train_examples: int | None = setting(None, "Training examples, for --num_train_epochs; unset: --max_steps.")
    packing: bool = setting(False, "Rows hold several examples; attention other than FlashAttention then has a mask.")
    device: str = setting("cuda", "cuda, or cpu, where attention with dropout keeps its whole matrix.")
    device_memory: float = setting(80e9, "Memory of a GPU in bytes.")
    reserved_memory: float = setting(4e9, "Of it, bytes left to CUDA, NCCL and fragmentation.")
    achieved_flops: float = setting(4e14, "FLOP/s that a GPU achieves.")
    intra_node_bandwidth: float = setting(3.6e11, "Bytes/s that a GPU sends to others of its node.")
    inter_node_bandwidth: float = setting(3.2e11, "Bytes/s that a node sends to other nodes, by all its links.")
    host_bandwidth: float = setting(5.1e10, "Bytes/s between a GPU and its host's memory.")
    intra_node_latency: float = setting(3.4e-6, "Seconds a hop of a ring within a node.")
    inter_node_latency: float = setting(14e-6, "Seconds a hop of a ring between nodes.")

    def __post_init__(self):
        for name in self.backend:
            if name not in BACKENDS:
                known = ", ".join(BACKENDS)
                raise InputError(f'--backend is "{name}"{nearest(name, BACKENDS)}, but must be one of {known}')
        if not self.backend:
            raise InputError(f"--backend is empty; name some of {', '.join(BACKENDS)}")
        for name in ("num_nodes", "processes_per_node", "num_train_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} is {value}, but must be at least 1")
        for name in ("device_memory", "achieved_flops", "intra_node_bandwidth", "inter_node_bandwidth",
                     "host_bandwidth"):  # fmt: skip
            if not 0.0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name} is {getattr(self, name):g}, but must be positive")
        for name in ("reserved_memory", "intra_node_latency", "inter_node_latency"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name} is {getattr(self, name):g}, but must not be negative")
        if self.device not in ("cpu", "cuda"):
            raise InputError(f'--device is "{self.device}", but must be cuda or cpu')
        self._check_offload()

    def _check_offload(self) -> None:
        if self.offload is None:
            return
        if self.offload == "optimizer":
            raise InputError("--offload is optimizer, but the loop refuses that: DeepSpeed would put its own Adam in "
                             "place of the one that leaves inactive layers alone; give base, or nothing")  # fmt: skip
        if self.offload != "base":
            raise InputError(f'--offload is "{self.offload}", but must be base, or be left out')
        cannot = next((name for name in self.backend if name not in DIVIDES_BASE), None)
        if cannot is not None:
            raise InputError(f"--offload base is for a base that is divided, but --backend {cannot} leaves it whole; "
                             f"give {', '.join(DIVIDES_BASE)}, or no --offload")  # fmt: skip

    @property
    def processes(self) -> int:
        return self.num_nodes * self.processes_per_node


@dataclass(frozen=True)
class ShapeSettings:
    """A model of Llama's kind by its sizes, in the place of a name."""

    hidden_size: int | None = setting(None, "With the five below: a Llama of these sizes instead of a named model.")
    intermediate_size: int | None = setting(None, "Width of its MLPs.")
    num_hidden_layers: int | None = setting(None, "Its blocks.")
    num_attention_heads: int | None = setting(None, "Its attention heads.")
    num_key_value_heads: int | None = setting(None, "Its key and value heads; unset: as many.")
    vocab_size: int | None = setting(None, "Its vocabulary.")
    tie_word_embeddings: bool = setting(False, "Its output layer is its embedding.")

    def __post_init__(self):
        optional = ("num_key_value_heads", "tie_word_embeddings")
        given = {name: value for name, value in vars(self).items() if value not in (None, False)}
        missing = next((name for name in vars(self) if name not in given and name not in optional), None)
        if given and missing is not None:
            raise InputError(f"--{next(iter(given))} was given without --{missing}; give all sizes, or a model's name")
        for name, value in given.items():
            if value < 1:
                raise InputError(f"--{name} is {value}, but must be at least 1")
        for name, of in (("num_attention_heads", "hidden_size"), ("num_key_value_heads", "num_attention_heads")):
            if name in given and given[of] % given[name]:
                raise InputError(f"--{name} is {given[name]}, which does not divide --{of} {given[of]}")
        if given and self.hidden_size // self.num_attention_heads % 2:
            raise InputError(f"--hidden_size {self.hidden_size} over {self.num_attention_heads} heads leaves each "
                             "an odd number of entries, but rotary positions need an even one")  # fmt: skip

    @property
    def given(self) -> bool:
        return self.hidden_size is not None
