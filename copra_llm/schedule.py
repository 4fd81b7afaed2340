"""How likely is an adapter to be active at time t of the run?

    p(t) = p_start + (p_end - p_start) * g(min(t / ramp_fraction, 1)),      t = step / total_steps in [0, 1)

`g` rises from 0 to 1; linear in the paper. CopRA is p_start = 0, p_end = 1, ramp_fraction = 3/4, so
p = min(4t / 3T, 1). Its successor CoTo starts at 0.1. Plain LoRA is the constant p = 1.

With a `depth_spread` d the layers ramp one after another: layer l of L begins when a part |d| l / (L - 1) of the ramp
is over (d > 0; from the last layer down for d < 0), and takes the part 1 - |d| of it. That is an ablation of ours.

Source: CopRA (arXiv 2410.22911), section 2.1; CoTo (ICML 2025) for p_start = 0.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from copra_llm.errors import InputError

SHAPES = {
    "linear": lambda s: s,
    "exponential": lambda s: math.expm1(3.0 * s) / math.expm1(3.0),
    "cosine": lambda s: 0.5 - 0.5 * math.cos(math.pi * s),
    # Ablations: p_start throughout; from p_end down to p_start.
    "constant": lambda s: 0.0,
    "reversed": lambda s: 1.0 - s,
}
"""Ramp shapes g: progress through the ramp in [0, 1] -> share of the way from p_start to p_end."""


_PARTS = 400
"""Of a run, over which p is averaged."""
ENOUGH = 150
"""Steps in which a layer should take part. Measured, CopRA alone minus plain LoRA at the same rate and number of steps:
on 6 layers (eval/sweep: DBpedia, two seeds, mean of three rates) -4.2 points of accuracy at 47 such steps, -1.7 at 94,
0.2 at 188; on 30 layers (eval/interpolation: two tasks, one to three seeds) about -6 at 47 and -2 at 94. So what counts
are the steps of a layer, not how many layers there are. On harder tasks (eval/study) 188 were too few as well, and on
QQP CopRA stayed behind at 750 and 1500: more steps do not make up for all of it."""


@dataclass(frozen=True)
class Schedule:
    """Activation probability (the probability of KEEPING a layer's adapter) over a run."""

    p_start: float = 0.0
    """Activation probability at t = 0, in [0, 1]."""
    p_end: float = 1.0
    """Activation probability from the end of the ramp on, in (0, 1]."""
    ramp_fraction: float = 0.75
    """Fraction of the optimizer steps spent ramping, in (0, 1]."""
    shape: str = "linear"
    """Key of `SHAPES`."""
    depth_spread: float = 0.0
    """Part of the ramp by which the last layer begins later than the first, in (-1, 1)."""

    def __post_init__(self):
        if not -1.0 < self.depth_spread < 1.0:
            raise InputError(f"depth_spread is {self.depth_spread}, but must lie in (-1, 1)")
        for name, low_open in (("p_start", False), ("p_end", True), ("ramp_fraction", True)):
            value = getattr(self, name)
            if not (0.0 < value <= 1.0 if low_open else 0.0 <= value <= 1.0):
                raise InputError(f"{name} is {value}, but must lie in {'(' if low_open else '['}0, 1]")
        if self.shape not in SHAPES:
            raise InputError(f"ramp_shape is {self.shape!r}, but must be one of {', '.join(SHAPES)}")

    def settled(self, t: float) -> bool:
        """Whether the ramp has ended at relative time `t`."""
        return t >= self.ramp_fraction or self.p_start == self.p_end or self.shape == "constant"

    def __call__(self, t: float) -> float:
        """Activation probability at relative time `t` in [0, 1]."""
        return self._at(min(t / self.ramp_fraction, 1.0))

    def of_layers(self, t: float, num_layers: int) -> list[float]:
        """Each layer's activation probability at relative time `t` in [0, 1]."""
        progress, spread = min(t / self.ramp_fraction, 1.0), abs(self.depth_spread)
        delays = [spread * layer / max(1, num_layers - 1) for layer in range(num_layers)]
        if self.depth_spread < 0.0:
            delays.reverse()
        return [self._at(min(max((progress - delay) / (1.0 - spread), 0.0), 1.0)) for delay in delays]

    def least_share(self, num_layers: int) -> float:
        """Share of a long run's steps in which the layer takes part that does so least."""
        shares = [self.of_layers((k + 0.5) / _PARTS, num_layers) for k in range(_PARTS)]
        return min(sum(layer) for layer in zip(*shares, strict=True)) / _PARTS

    def _at(self, progress: float) -> float:
        """Activation probability at a part of the ramp in [0, 1]."""
        return self.p_start + (self.p_end - self.p_start) * SHAPES[self.shape](progress)


METHODS = {
    "lora": Schedule(p_start=1.0),
    "copra": Schedule(p_start=0.0),
    "coto": Schedule(p_start=0.1),
}
"""The presets behind `--method`."""


def too_short(schedule: Schedule, steps: int, num_layers: int) -> str | None:
    """What to say of a run that leaves layers out so often that they are trained too little; None: nothing.

    Args:
        schedule: of the run.
        steps: optimizer steps.
        num_layers: that are switched on and off.
    """
    share = schedule.least_share(num_layers)
    if share == 1.0 or share * steps >= ENOUGH:
        return None
    return (f"of {steps} steps each of the {num_layers} layers takes part in some {share * steps:.0f}, but where it "
            f"was less than {ENOUGH} adapters were worse alone than plain LoRA's; give at least "
            f"{math.ceil(ENOUGH / share)} steps, or --method lora")  # fmt: skip
