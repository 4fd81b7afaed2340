"""One contender after the other, again and again: first losses, counts, seconds; and of each alone its memory.

A first round, of a step each, does not count: it warms up, and shows that all train the same. Then operations and
bytes are counted, and then the rounds are timed. What one contender took is divided by what another took in the same
round, so that what the machine does besides weighs on both.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable

from contenders import CONTENDERS, SCHEDULED, contenders_of
from sampling import seeds_like_a_long_run
from watches import Clock, Counter
from workloads import NATURAL_STEPS, Workload, without_dropout

from copra_llm.results import peak_memory_bytes

COUNTED = 4
"""Steps of the schedule over which operations and bytes are counted."""
WHOLE = ("trainer", "copra")
"""Who trains on texts of their own lengths."""
APART = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far first losses may be apart, relatively: sums in another order, of numbers with 8 bits in bfloat16."""


def timed(w: Workload, device: str, rounds: int, steps: int, say: Callable[[str], None]) -> dict:
    """Everything but memory, which each contender is asked for in a process of its own.

    Args:
        w: model and data, on the device.
        device: "cpu" or "cuda".
        rounds: that count.
        steps: of CopRA's schedule in a round; the others, whose steps are all alike, take a quarter of them.
        say: is told how long all of it will take, memory included.

    Returns:
        `first_loss` and `counts` by contender, and `seconds` (of a step) and `whole` (of a run):
        `{contender: {clock: [of each round]}}`.
    """
    names, loading = contenders_of(w), time.process_time()
    took = {name: steps if name in SCHEDULED else max(1, steps // 4) for name in names}
    natural = list(WHOLE) if w.natural is not None else []
    losses, one = warmed_up(w, device, names)
    a_round = sum(took[name] * one[name] for name in names) + NATURAL_STEPS * sum(one[name] for name in natural)
    counting = sum(one[name] * (COUNTED if name in SCHEDULED else 1) for name in names)
    memory = sum(loading + memory_steps(name) * one[name] for name in remembered(names))
    say(f"about {(rounds * a_round + counting + memory) / 60:.1f} minutes")
    counts = {name: counted(w, device, name) for name in names}
    seconds, whole = {name: [] for name in names}, {name: [] for name in natural}
    for _, seed in zip(range(rounds), itertools.cycle(seeds_like_a_long_run(w, steps, rounds)), strict=False):
        for name in names:
            of_all = seconds_of(w, device, name, took[name], seed)
            seconds[name].append({clock: value / took[name] for clock, value in of_all.items()})
        for name in natural:
            whole[name].append(seconds_of(w, device, name, NATURAL_STEPS, seed, whole=True))
    return {"first_loss": losses, "counts": counts, "seconds": _by_clock(seconds), "whole": _by_clock(whole)}


def remembered(names: Iterable[str]) -> list[str]:
    """Whose memory is measured: the truncated base's peak is that of the base, where all layers are active."""
    return [name for name in names if name != "truncated"]


def memory_steps(name: str) -> int:
    """Of a run whose peak memory is measured: the second step has the optimizer's moments, and of a schedule that is
    sampled at four places the last one has all layers active."""
    return 4 if name in SCHEDULED else 2


def peak_bytes(w: Workload, device: str, name: str) -> int:
    """Peak memory of a contender that has this process to itself."""
    steps = memory_steps(name)
    CONTENDERS[name](w, device, w.full, steps, 0, Clock(steps, device))
    return peak_memory_bytes()


def warmed_up(w: Workload, device: str, names: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Each contender's loss in nats at its first step, and the wall-clock seconds that it took.

    Raises:
        AssertionError: if losses are further apart than rounding puts them.
    """
    losses, seconds = {}, {}
    with without_dropout(w):
        for name in names:
            clock = Clock(1, device)
            losses[name] = CONTENDERS[name](w, device, w.full, 1, 0, clock)
            seconds[name] = clock.seconds["wall"]
    apart = APART[w.config.model.dtype]
    if not all(math.isclose(loss, losses["base"], rel_tol=apart) for loss in losses.values()):
        raise AssertionError(f"the contenders do not train the same: {losses}")
    return losses, seconds


def counted(w: Workload, device: str, name: str) -> dict[str, float]:
    """Operations and bytes of a contender's step, in the mean over its schedule."""
    steps = COUNTED if name in SCHEDULED else 1
    seed = seeds_like_a_long_run(w, steps, 1)[0] if name in SCHEDULED else 0
    with Counter([w.peft, w.bare]) as counter:
        CONTENDERS[name](w, device, w.full, steps, seed, counter)
    return vars(counter.mean())


def seconds_of(w: Workload, device: str, name: str, steps: int, seed: int, whole: bool = False) -> dict[str, float]:
    """By clock what these steps take together; `whole`: on texts of their own lengths."""
    clock = Clock(steps, device)
    CONTENDERS[name](w, device, w.natural if whole else w.full, steps, seed, clock)
    return clock.seconds


def _by_clock(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    return {name: {clock: [r[clock] for r in found] for clock in found[0]} for name, found in rounds.items()}
