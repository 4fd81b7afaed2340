"""What does a training step cost, relative to others on the same batches, and are the goals met?

    ratio of two contenders: median over interleaved rounds of (seconds of one / seconds of the other), and the range

Seconds are the processor's on a CPU, which other processes do not add to, and the device's own on a GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from copra_llm.estimates import Estimate, exact
from copra_llm.results import Result

PROTOCOL = "speed_step"
CONTENDERS = {
    "base": "frozen base, forward + backward",
    "truncated": "frozen base, truncated as CopRA",
    "peft": "PEFT LoRA, bare loop",
    "trainer": "Trainer + PEFT LoRA",
    "sft": "TRL's SFTTrainer",
    "lora": "this loop, LoRA",
    "copra": "this loop, CopRA",
}
"""What each is called in tables."""
PAIRS = ("copra/truncated", "copra/peft", "truncated/peft")
"""Ratios of a step's seconds that goals are about, beside those of each contender to the base."""


@dataclass(frozen=True)
class Goal:
    """A ratio that is to stay below a limit."""

    what: str
    ratio: str
    """Its name in the record's metrics, after "ratio/"."""
    limit: float
    """What it should be at most."""
    floor: str | None = None
    """The ratio that no adapter could go below, if there is one."""


GOALS = (
    Goal("plain LoRA's step over the frozen base's forward + backward", "lora/base", 1.12),
    Goal("CopRA's step over the frozen base truncated at the same layers", "copra/truncated", 1.08),
    Goal("CopRA's step over PEFT LoRA's in the bare loop", "copra/peft", 0.80, "truncated/peft"),
    Goal("CopRA's whole run over Trainer's with PEFT LoRA, wall clock", "whole/copra/trainer", 0.72),
    Goal("bytes CopRA saves for the backward pass over PEFT LoRA's", "saved/copra/peft", 0.80, "saved/truncated/peft"),
)
"""Of SmolLM2 in float32; means over CopRA's whole schedule."""
COMPILED_PAIRS = ("compiled/plain", "compiled/peft", "compiled/truncated", "plain/peft", "plain/truncated")
"""What the record of `--torch_compile` compares: CopRA's step with and without, PEFT LoRA, the truncated base."""
COMPILED_GOALS = {"copra/peft": "compiled/peft", "copra/truncated": "compiled/truncated"}
"""A goal's ratio, and its name where CopRA's blocks are compiled."""
PROFILED = ("base", "lora", "truncated", "copra")
"""Whose time is taken apart: the second and the fourth are the others with an adapter."""
JUDGED = {"model": "smollm2", "precision": "float32"}
"""The records that the goals are about."""
EVALUATION_GOAL = 3.0
"""Least ratio of examples a second, evaluating MTL15, to those of scoring each label apart: geometric mean."""


def paired_ratio(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Median and range over rounds of `first / second`."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return Estimate(statistics.median(ratios), min(ratios), max(ratios))


def step_metrics(
    seconds: Mapping[str, Mapping[str, Sequence[float]]], whole: Mapping[str, Mapping[str, Sequence[float]]], clock: str
) -> dict[str, float]:
    """Medians and ratios for the record.

    Args:
        seconds: `{contender: {clock: seconds a step in each round}}`.
        whole: `{contender: {clock: seconds of a run in each round}}`; empty where there is none.
        clock: "cpu" or "gpu".
    """
    metrics = {f"seconds_per_step/{name}": statistics.median(found[clock]) for name, found in seconds.items()}
    ratios = {}
    for pair in (*(f"{name}/base" for name in seconds if name != "base"), *PAIRS):
        first, second = pair.split("/")
        ratios[pair] = paired_ratio(seconds[first][clock], seconds[second][clock])
    if whole:
        ratios["whole/copra/trainer"] = paired_ratio(whole["copra"]["wall"], whole["trainer"]["wall"])
    for pair, ratio in ratios.items():
        metrics |= {f"ratio/{pair}": ratio.mean, f"ratio_min/{pair}": ratio.low, f"ratio_max/{pair}": ratio.high}
    return metrics


def step_records(results: Iterable[Result]) -> list[Result]:
    """The records of training steps, by model, precision and device."""
    found = [r for r in results if r.protocol == PROTOCOL]
    return sorted(found, key=lambda r: tuple(r.config[key] for key in ("model", "precision", "device")))


def ratio_of(r: Result, pair: str) -> Estimate | None:
    """A ratio with its range over rounds, where it has one; None where it was not measured."""
    value = r.metrics.get(f"ratio/{pair}")
    if value is None:
        return None
    if f"ratio_min/{pair}" not in r.metrics:
        return exact(value)
    return Estimate(value, r.metrics[f"ratio_min/{pair}"], r.metrics[f"ratio_max/{pair}"])


def device_of(r: Result) -> str:
    """A GPU's name, or "CPU"."""
    device = r.environment.get("device", "cpu")
    return "CPU" if device == "cpu" else device


def verdict(ratio: Estimate, limit: float, at_least: bool = False) -> str:
    """Whether the median is at most (or at least) the limit, and whether some rounds say otherwise."""
    mixed = ratio.has_interval and ratio.low <= limit < ratio.high
    if ratio.mean >= limit if at_least else ratio.mean <= limit:
        return "met, not in all rounds" if mixed else "met"
    return "not met, but in some rounds" if mixed else "not met"
