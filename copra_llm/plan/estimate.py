"""What will a run need? Memory, bytes, time and files, for each backend.

    step = max(F / R, communication) ... F / R + communication        [seconds]

F: operations of a step's micro-batches with the expected share of active adapters; R: operations a second that the
device achieves. The first figure hides all communication behind computation, the second none; both are given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.models import dtype_of
from copra_llm.plan.cluster import ClusterSettings, ShapeSettings
from copra_llm.plan.expected import Participation, participation
from copra_llm.plan.layout import Layout, layout, refuse
from copra_llm.plan.memory import Memory, memory
from copra_llm.plan.sizes import Sizes, configuration, empty_model, measure
from copra_llm.plan.trace import Batch, Work, trace
from copra_llm.plan.traffic import Traffic, seconds, traffic


@dataclass(frozen=True)
class BackendPlan:
    """One backend's answer; bytes are of one process, bytes sent of an optimizer step."""

    backend: str
    memory: Memory
    fits: bool
    traffic: Traffic
    gradients_if_all: float
    """Bytes of gradients sent if inactive players' travel too."""
    flops: float
    """Operations of an optimizer step on one process, expected."""
    compute_seconds: float
    communication_seconds: float

    @property
    def step_seconds(self) -> tuple[float, float]:
        """All communication hidden behind computation; none of it."""
        return (max(self.compute_seconds, self.communication_seconds),
                self.compute_seconds + self.communication_seconds)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a run will need."""

    name: str
    """Of the base model."""
    sizes: Sizes
    share: Participation
    work: Work
    """As the first backend computes."""
    steps: int
    tokens_a_step: int
    checkpoint: int
    """Bytes of a checkpoint: the adapter and AdamW's two moments; its small files are left out."""
    backends: tuple[BackendPlan, ...] = field(default=())


def make_plan(config: RunConfig, cluster: ClusterSettings, shape: ShapeSettings | None = None) -> Plan:
    """Plan a run; nothing is loaded.

    Args:
        config: the run's settings; of the data, `max_length` alone counts, all rows being that long.
        cluster: machines and backends.
        shape: sizes in the place of the model's name.

    Raises:
        InputError: for settings that contradict, or a model that cannot be planned.
    """
    train, shape = config.train, shape or ShapeSettings()
    if config.schedule.depth_spread:
        raise InputError("--depth_spread gives each layer a ramp of its own, which this plan does not reckon with; "
                         "leave it out")  # fmt: skip
    architecture, source = configuration(config.model, shape, config.data.max_length)
    base, model = empty_model(architecture, source, config.model.dtype, config.lora)
    sizes = measure(base, model, config.model, config.lora, config.schedule)
    layouts = [layout(name, cluster) for name in cluster.backend]
    for at in layouts:
        refuse(at, sizes, config)
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps * cluster.processes
    steps = _steps(config, cluster, rows)
    if config.schedule.mask_per == "example":
        share = Participation(1.0, 1.0)  # some example of the batch has each layer in nearly every step
    else:
        share = participation(config.schedule.schedule(), sizes.players_of_block, steps)
    works = {pieces: _work(config, cluster, architecture, pieces) for pieces in {at.calls_pieces for at in layouts}}
    return Plan(
        name=source.name,
        sizes=sizes,
        share=share,
        work=works[layouts[0].calls_pieces],
        steps=steps,
        tokens_a_step=rows * config.data.max_length,
        checkpoint=sizes.adapter_file + 8 * sizes.trained_params,
        backends=tuple(_backend(at, config, cluster, sizes, share, works[at.calls_pieces]) for at in layouts),
    )


def _backend(
    at: Layout, config: RunConfig, cluster: ClusterSettings, sizes: Sizes, share: Participation, work: Work
) -> BackendPlan:
    accumulation = config.train.gradient_accumulation_steps
    mixed = config.train.mixed_precision != "no"
    held = memory(at, sizes, work, accumulation, 2 if mixed else dtype_of(config.model.dtype).itemsize)
    flow = traffic(at, sizes, share, accumulation)
    everything = traffic(at, sizes, replace(share, active=1.0), accumulation)
    flops = accumulation * work.flops(share.active, share.reached)
    return BackendPlan(
        backend=at.backend,
        memory=held,
        fits=held.total <= cluster.device_memory - cluster.reserved_memory,
        traffic=flow,
        gradients_if_all=everything.sent("gradients"),
        flops=flops,
        compute_seconds=flops / cluster.achieved_flops,
        communication_seconds=seconds(flow, at, cluster),
    )


def _work(config: RunConfig, cluster: ClusterSettings, architecture, calls_pieces: bool) -> Work:
    train, attention = config.train, config.model.attn_implementation
    batch = Batch(
        rows=train.per_device_train_batch_size,
        length=config.data.max_length,
        checkpointing=train.gradient_checkpointing,
        autocast=train.mixed_precision != "no",
        dropout=cluster.device == "cpu",
        fused=train.use_fused_lora and not calls_pieces,
        masked=cluster.packing and not (attention or "").startswith("flash_attention"),
    )
    return trace(architecture, config.model.dtype, config.lora, attention, batch)


def _steps(config: RunConfig, cluster: ClusterSettings, rows: int) -> int:
    examples, train = cluster.num_train_examples, config.train
    if examples is not None and rows > examples:
        raise InputError(f"a step of {cluster.processes} processes takes {rows} examples, but --num_train_examples is "
                         f"{examples}; give fewer processes, or a smaller --per_device_train_batch_size")  # fmt: skip
    if train.max_steps != -1:
        return train.max_steps
    if examples is None:
        raise InputError("neither --max_steps nor --num_train_examples was given, so the run has no length; give one")
    return max(1, math.ceil(train.num_train_epochs * examples / rows))
