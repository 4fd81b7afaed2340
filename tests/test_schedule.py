"""The activation probability p(t) of `copra_llm.schedule`."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from copra_llm.errors import InputError
from copra_llm.schedule import ENOUGH, METHODS, SHAPES, Schedule, too_short

TIMES = [i / 1000 for i in range(1001)]


def test_presets_start_and_end_where_their_papers_say():
    """lora is 1 throughout; copra goes from 0 to 1, coto from 0.1 to 1."""
    assert sorted(METHODS) == ["copra", "coto", "lora"]
    assert all(METHODS["lora"](t) == 1.0 for t in TIMES)
    assert (METHODS["copra"](0.0), METHODS["copra"](1.0)) == (0.0, 1.0)
    assert (METHODS["coto"](0.0), METHODS["coto"](1.0)) == (0.1, 1.0)


@pytest.mark.parametrize("total", [1, 3, 4, 7, 300, 1001])
def test_copra_is_the_papers_formula(total: int):
    """p = min(4t / 3T, 1) at every step t of T, to the two roundings of the two divisions."""
    for step in range(total):
        exact = min(Fraction(4 * step, 3 * total), Fraction(1))
        assert abs(Fraction(METHODS["copra"](step / total)) - exact) <= 2 * Fraction(math.ulp(float(exact)))


@pytest.mark.parametrize("method", ["copra", "coto"])
@pytest.mark.parametrize("total", [4, 7, 300, 1001])
def test_the_last_quarter_is_plain_lora(method: str, total: int):
    """From 3T/4 on p is exactly 1, and before it less than 1."""
    for step in range(total):
        assert (METHODS[method](step / total) == 1.0) == (4 * step >= 3 * total)


@pytest.mark.parametrize("ramp_fraction", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_shapes_are_monotone_between_their_end_points(shape: str, ramp_fraction: float):
    """Rising shapes go from p_start to p_end, reversed the other way, constant stays at p_start."""
    schedule = Schedule(p_start=0.2, p_end=0.9, ramp_fraction=ramp_fraction, shape=shape)
    values = [schedule(t) for t in TIMES]
    first, last = {"constant": (0.2, 0.2), "reversed": (0.9, 0.2)}.get(shape, (0.2, 0.9))
    assert values[0] == pytest.approx(first, abs=1e-15)
    assert all(schedule(t) == values[-1] for t in TIMES if t >= ramp_fraction)
    assert values[-1] == pytest.approx(last, abs=1e-15)
    steps = [b - a for a, b in zip(values, values[1:], strict=False)]
    assert all(s <= 0 for s in steps) if shape == "reversed" else all(s >= 0 for s in steps)
    if shape != "constant":
        inside = [s for s, t in zip(steps, TIMES, strict=False) if t + 0.001 <= ramp_fraction]
        assert all(s != 0 for s in inside)


def test_shapes_are_told_apart_in_the_middle():
    """Half-way, the cosine is half, the exponential less than half."""
    middle = {shape: Schedule(ramp_fraction=1.0, shape=shape)(0.5) for shape in SHAPES}
    assert middle["linear"] == 0.5
    assert middle["cosine"] == pytest.approx(0.5, abs=1e-15)
    assert middle["exponential"] == pytest.approx((math.e**1.5 - 1) / (math.e**3 - 1), rel=1e-12)
    assert middle["constant"] == 0.0


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_probabilities_stay_in_range_for_any_start(shape: str):
    """No rounding takes p out of [0, 1], which the mask would refuse; a full ramp ends at exactly 1."""
    for i in range(0, 1001, 7):
        schedule = Schedule(p_start=i / 1001, shape=shape)
        assert all(0.0 <= schedule(t) <= 1.0 for t in TIMES[::13])
        assert shape in ("constant", "reversed") or schedule(1.0) == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("p_start", -0.1),
        ("p_start", 1.1),
        ("p_start", math.nan),
        ("p_end", 0.0),
        ("p_end", 1.5),
        ("ramp_fraction", 0.0),
        ("ramp_fraction", 1.01),
        ("ramp_fraction", math.inf),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float):
    """The sentence names the setting and its value."""
    with pytest.raises(InputError, match=rf"{name} is {value}"):
        Schedule(**{name: value})


def test_unknown_shape_is_refused():
    """The sentence names the shape and the ones there are."""
    with pytest.raises(InputError, match="'linaer'.*linear, exponential, cosine"):
        Schedule(shape="linaer")


# --- too few steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, share",
    [(METHODS["copra"], 5 / 8), (METHODS["coto"], 1 - 0.75 * 0.9 / 2), (METHODS["lora"], 1.0),
     (Schedule(p_start=0.5, shape="constant"), 0.5), (Schedule(depth_spread=0.5), 0.25 + 0.75 * 0.5 / 2)],
)  # fmt: skip
def test_the_share_of_steps_of_the_layer_that_trains_least(schedule: Schedule, share: float):
    """By hand: p's mean over the run; with a spread that of the layer which begins last."""
    assert schedule.least_share(6) == pytest.approx(share, abs=2e-3)


def test_a_run_that_trains_its_layers_too_little_is_told_how_long_to_be():
    copra, needed = METHODS["copra"], math.ceil(ENOUGH / 0.625)
    said = too_short(copra, 120, 30)
    assert said.startswith("of 120 steps each of the 30 layers takes part in some 75,")
    steps = int(said.split("at least ")[1].split()[0])
    assert abs(steps - needed) <= 1
    assert too_short(copra, steps - 2, 30) and too_short(copra, steps, 30) is None


def test_plain_lora_is_never_too_short():
    assert too_short(METHODS["lora"], 1, 30) is None
