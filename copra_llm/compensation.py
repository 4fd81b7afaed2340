"""How is it made up for that a layer takes part in some of the steps only?

    rescaled:     y = f(x; W_l + delta_l / q_l * Delta W_l)     so that the expected weight change is Delta W_l
    compensated:  learning rate / q^c                           so that a layer that moves rarely moves as far

q_l is the share of steps in which the layer is active: its probability, given that a layer is (`masks`). Both are
ablations of ours; neither is in CopRA. Rescaling is what dropout does (Srivastava et al., 2014).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.optim import Optimizer

from copra_llm.masks import marginal_probs
from copra_llm.settings import ScheduleSettings


def layer_scales(settings: ScheduleSettings, p: Sequence[float]) -> list[float] | None:
    """What each layer's update is multiplied with while it is active; None: nothing is.

    Args:
        settings: of the run.
        p: activation probability of each layer.
    """
    if not settings.rescale_active:
        return None
    # A layer that is never active needs no scale.
    return [1.0 / q if q > 0.0 else 1.0 for q in marginal_probs(p)]


@contextmanager
def compensated(settings: ScheduleSettings, optimizer: Optimizer, p: Sequence[float]) -> Iterator[None]:
    """The optimizer with the learning rate of a step whose layers are active with probabilities `p`."""
    before = [group["lr"] for group in optimizer.param_groups]
    if settings.rate_compensation:
        # All shares are alike: settings refuse anything else.
        share = marginal_probs(p)[0]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] / share**settings.rate_compensation
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
