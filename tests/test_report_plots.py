"""The report's own drawing: where a mark stands is what its number says, and every colour can be read."""

from __future__ import annotations

import dataclasses
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from copra_llm.estimates import Estimate, bootstrap_pairs, exact
from copra_llm.figures.groups import grouped, short_names, styles
from copra_llm.report.palette import (
    DASHES,
    LEVELS,
    RAMPS,
    SERIES,
    THEMES,
    contrast,
    level,
    luminance,
    ramp,
    text_on,
)
from copra_llm.report.plots.axes import Scale, limits, tick_texts, ticks, words
from copra_llm.report.plots.bars import Bars, lying_bars, upright_bars
from copra_llm.report.plots.heat import heat_map
from copra_llm.report.plots.lines import Line, line_plot
from copra_llm.report.plots.marks import SHAPES, dash, error_bar
from copra_llm.report.plots.points import Dot, Point, dots, scatter

NAN = float("nan")


def tree(drawing) -> ET.Element:
    return ET.fromstring(f"<svg>{drawing.content}</svg>")


def texts(drawing) -> list[str]:
    return [node.text for node in tree(drawing).iter("text")]


def paths(drawing, kind: str) -> list[list[float]]:
    """Numbers of every path of a class."""
    found = [node.get("d") for node in tree(drawing).iter("path") if node.get("class") == kind]
    return [[float(n) for n in re.findall(r"-?\d+\.?\d*", d)] for d in found]


def marker_places(drawing) -> np.ndarray:
    """Where the markers stand `(markers, 2)`."""
    return np.array([numbers[:2] for numbers in paths(drawing, "mk")])


# --- colours ----------------------------------------------------------------------------------------------


def test_contrast_is_wcags():
    """Black on white is 21, a colour on itself 1; #767676 on white is the usual example of 4.54."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#123456", "#123456") == 1.0
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)


@pytest.mark.parametrize("theme", THEMES)
def test_text_and_marks_are_seen(theme):
    """WCAG AA: 4.5 for text on both of the page's backgrounds, 3 for what is drawn."""
    colours = THEMES[theme]
    for background in ("paper", "raised"):
        for name in ("ink", "muted", "link"):
            assert contrast(colours[name], colours[background]) >= 4.5, (name, background)
        for colour in (*SERIES[theme], colours["frame"], colours["focus"]):
            assert contrast(colour, colours[background]) >= 3.0, (colour, background)


@pytest.mark.parametrize("theme", THEMES)
def test_a_heat_map_is_read_by_lightness_and_its_numbers_on_every_level(theme):
    colours = ramp(theme)
    light = [luminance(colour) for colour in colours]
    assert len(colours) == LEVELS and (colours[0], colours[-1]) == (RAMPS[theme][0], RAMPS[theme][-1])
    assert light == sorted(light, reverse=theme == "light") and len(set(colours)) == LEVELS
    assert min(contrast(text_on(colour), colour) for colour in colours) >= 4.5


@pytest.mark.parametrize("theme", THEMES)
def test_the_three_methods_are_told_apart_without_colour_vision(theme):
    """Simulated protanopia and deuteranopia (Vienot, Brettel and Mollon 1999): still 0.08 apart in OKLab.

    0.08 is several times what is just seen (about 0.02), and markers and dashes differ too.
    """
    from copra_llm.report.palette import _linear, _to_oklab

    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    protan = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    deutan = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])

    def seen(colour: str, eye: np.ndarray) -> np.ndarray:
        linear = np.clip(np.linalg.solve(to_lms, eye @ to_lms @ _linear(colour)), 0, 1)
        srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        return _to_oklab("#" + "".join(f"{round(255 * c):02x}" for c in srgb))

    for eye in (np.eye(3), protan, deutan):
        points = [seen(colour, eye) for colour in SERIES[theme][:3]]
        assert min(np.linalg.norm(points[i] - points[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 0.08


def test_every_series_has_a_mark_of_its_own():
    """Colour, marker and dash: no two of the first 56 series agree in all."""
    assert len(SHAPES) == len(DASHES) == len(SERIES["light"]) == len(SERIES["dark"]) == 8
    assert len({(i % 8, dash(i)) for i in range(56)}) == 56
    assert styles(["b", "LoRA", "a"]) == {"LoRA": 0, "CoTo": 1, "CopRA": 2, "a": 3, "b": 4}


def test_levels_cover_the_range():
    assert [level(v, 0.0, 10.0) for v in (-1.0, 0.0, 5.0, 10.0, 11.0)] == [0, 0, 10, 20, 20]
    assert level(3.0, 3.0, 3.0) == 10


# --- scales -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]), (0, 100, ["0", "20", "40", "60", "80", "100"]),
     (-0.013, 0.031, ["-0.01", "0", "0.01", "0.02", "0.03"]), (83.2, 86.9, ["84", "85", "86"]), (5, 5, ["5"])],
)  # fmt: skip
def test_ticks_are_round_and_within(low, high, expected):
    assert tick_texts(ticks(low, high)) == expected


def test_limits_show_every_value_and_do_not_let_an_interval_dwarf_them():
    low, high = limits([80.0, 90.0], [-500.0, 700.0])
    assert 68.0 < low < 70.0 < 100.0 < high < 102.0
    assert limits([80.0, 90.0], [0.0, 200.0], within=(0, 100))[1] == 100
    assert limits([NAN]) == (0.0, 1.0)
    low, high = limits([7.0, 7.0])
    assert low < 7.0 < high


def test_a_scale_is_linear_and_clamps():
    scale = Scale(0.0, 10.0, 100.0, 0.0)
    assert [scale(v) for v in (0, 5, 10)] == [100.0, 50.0, 0.0] and scale.clamped(12.0) == 0.0
    assert Scale(3.0, 3.0, 0.0, 10.0)(3.0) == 5.0


def test_long_names_are_cut_in_the_middle():
    assert words("short", 9) == "short" and words("a" * 9 + "b" * 9, 9) == "aaaa…bbbb"
    assert short_names(["model.layers.0.q", "model.layers.11.q"]) == ["0", "11"]
    assert short_names(["vision.0", "text.0"]) == ["vision", "text"] and short_names(["a.0"]) == ["a.0"]
    assert short_names(["a.0", "a.0.b"]) == ["0", "0.b"]


# --- plots ------------------------------------------------------------------------------------------------


def test_a_line_goes_through_its_points():
    """Equally spaced values stand at equally spaced heights; the higher the value, the higher the mark."""
    values = [Estimate(v, v - 1, v + 1) for v in (10.0, 20.0, 30.0)]
    drawing = line_plot([Line("LoRA", 0, [0.0, 0.5, 1.0], values)], "x", "y")
    places = marker_places(drawing)
    steps = np.diff(places, axis=0)
    assert steps[0] == pytest.approx(steps[1], abs=0.11) and steps[0][0] > 0 > steps[0][1]
    assert [t for t in tree(drawing).iter("title")][1].text == "LoRA, 0.5: 20.0 [19.0, 21.0]"
    assert len(paths(drawing, "band")) == 1 and not paths(drawing, "err")
    (line,) = paths(drawing, "ln")
    assert np.array(line).reshape(-1, 2) == pytest.approx(places, abs=0.11)


def test_a_point_that_is_not_finite_is_a_gap():
    drawing = line_plot([Line("a", 0, [0, 1, 2], [exact(1.0), exact(NAN), exact(2.0)])], "x", "y")
    (line,) = [n.get("d") for n in tree(drawing).iter("path") if n.get("class") == "ln"]
    assert line.count("M") == 2 and len(marker_places(drawing)) == 2 and "nan" not in str(drawing.content)


def test_upright_bars_rise_from_zero_in_proportion():
    drawing = upright_bars([Bars("a", 0, [Estimate(2.0, 1.0, 3.0), exact(-1.0), None])], ["0", "1", "2"], "layer", "y")
    (_, zero, top, width, _), (_, zero2, bottom, _, _) = paths(drawing, "bar")
    assert zero == zero2 and (zero - top) == pytest.approx(-2 * (zero2 - bottom), abs=0.3) and width > 0
    (error,) = paths(drawing, "err")
    assert error[1] - error[2] == pytest.approx(zero - top, abs=0.3)  # from 1 to 3: as long as the bar of 2


def test_an_interval_that_is_cut_has_no_cap():
    """So that it is not read as ending there."""
    scale = Scale(0.0, 10.0, 100.0, 0.0)
    assert str(error_bar(5.0, Estimate(5.0, 2.0, 8.0), scale)).count("h6") == 2
    assert str(error_bar(5.0, Estimate(5.0, 2.0, 80.0), scale)).count("h6") == 1
    assert error_bar(5.0, exact(5.0), scale) is None
    wide = Dot("a", 0, Estimate(1.0, -40.0, 42.0), "t")
    assert str(dots([("x", [wide])], "lost").content).count("v6") == 0


def test_lying_bars_share_their_zero_and_carry_their_number():
    series = [Bars("LoRA", 0, [exact(50.0), exact(100.0)]), Bars("CopRA", 2, [exact(25.0), None])]
    drawing = lying_bars(series, ["all", "low"], "accuracy", limit=(0, 100), reference=100.0)
    bars = paths(drawing, "bar")
    lengths = [end - start for start, _, end, *_ in bars]
    assert lengths == pytest.approx([lengths[1] / 2, lengths[1], lengths[1] / 4], abs=0.2)
    assert {"50.0", "100.0", "25.0", "all", "low"} <= set(texts(drawing))
    assert paths(drawing, "mark")[0][0] == pytest.approx(bars[1][2], abs=0.1)


def test_bars_of_one_lane_stand_in_their_own_rows():
    drawing = lying_bars([Bars("a", 0, [exact(1.0), None]), Bars("b", 1, [None, exact(2.0)])], ["a", "b"], "x", lanes=1)
    assert drawing.height == lying_bars([Bars("a", 0, [exact(1.0), exact(2.0)])], ["a", "b"], "x").height


def test_a_heat_map_has_its_first_row_at_the_bottom_and_its_extremes_at_the_ends():
    drawing = heat_map([[0.0, 50.0], [None, 100.0]], ["75", "150"], ["0.001", "0.004"], "steps", "rate")
    cells = [n for n in tree(drawing).iter("rect") if n.get("height") != "9"]
    assert [c.get("class") for c in cells] == ["h0", "h10", "none", "h20"]
    assert float(cells[0].get("y")) > float(cells[2].get("y")) and cells[0].get("x") == cells[2].get("x")
    assert cells[1][0].text == "rate 0.001, steps 150: 50.0"
    assert {"0.0", "50.0", "100.0"} <= set(texts(drawing)) and "nan" not in str(drawing.content)


def test_corners_are_drawn_where_they_are():
    """In units of cells: (0, 0) is the middle of the lower left cell."""
    drawing = heat_map([[1.0, 2.0], [3.0, 4.0]], ["0", "1"], ["0", "1"], "x", "y", square=True,
                       corners=[("A", 0, 0), ("B", 1, 0), ("C", 0.5, 1)])  # fmt: skip
    places = np.array([numbers[:2] for numbers in paths(drawing, "mo")])
    cells = [n for n in tree(drawing).iter("rect") if n.get("height") != "9"]
    middles = [float(c.get(k)) + float(c.get(s)) / 2 for c in cells[:2] for k, s in (("x", "width"), ("y", "height"))]
    assert places[:2].ravel() == pytest.approx(middles, abs=1.0)  # cells are drawn a unit smaller than they are
    assert places[2][0] == pytest.approx(places[:2, 0].mean(), abs=0.1) and places[2][1] < places[0][1]


def test_dots_stand_at_their_values_beside_a_marked_zero():
    rows = [("sst2", [Dot("LoRA", 0, Estimate(10.0, 5.0, 15.0), "88.0 → 78.0"), Dot("CopRA", 2, exact(-5.0), "t")])]
    drawing = dots(rows, "lost")
    (first, second), ((zero, *_),) = marker_places(drawing), paths(drawing, "mark")
    assert first[0] - zero == pytest.approx(-2 * (second[0] - zero), abs=0.31)  # three places, each rounded to a tenth
    ((left, _, right, *_),) = paths(drawing, "err")
    assert (right - left) == pytest.approx(first[0] - zero, abs=0.2)  # from 5 to 15: as far as 10 from 0
    assert {"88.0 → 78.0", "t", "sst2"} <= set(texts(drawing))
    assert len(marker_places(dots([("a", [Dot("x", 0, exact(NAN), "t"), Dot("y", 1, exact(1.0), "u")])], "x"))) == 1


def test_a_scatter_keeps_the_order_of_its_points():
    points = [Point(0.0, 0.0, 0, "a"), Point(1.0, 2.0, 1, "b", "0.004"), Point(NAN, 0.0, 2, "c")]
    drawing = scatter(points)
    (first, second) = marker_places(drawing)
    assert first[0] < second[0] and first[1] > second[1] and texts(drawing) == ["0.004"]


@pytest.mark.parametrize("draw", [
    lambda: line_plot([], "x", "y"), lambda: upright_bars([], [], "x", "y"), lambda: lying_bars([], [], "x"),
    lambda: heat_map([], [], [], "x", "y"), lambda: scatter([]), lambda: dots([], "x"),
])  # fmt: skip
def test_nothing_to_draw_is_an_empty_frame(draw):
    assert math.isfinite(draw().height) and tree(draw()) is not None


# --- estimates and groups ---------------------------------------------------------------------------------


def test_the_bootstrap_over_pairs_and_examples_has_the_right_spread():
    """One pair of n examples, of which a share q is right: a binomial's interval.

    Its half width is 1.96 sqrt(q (1 - q) / n), up to the 2000 draws' own error and the percentiles' steps of 1 / n.
    """
    n, q = 400, 0.8
    values = (np.arange(n) < q * n).astype(float)[None]
    estimate = bootstrap_pairs(values)
    half = 1.96 * math.sqrt(q * (1 - q) / n)
    assert estimate.mean == q
    assert (q - estimate.low, estimate.high - q) == pytest.approx((half, half), abs=0.1 * half + 1 / n)
    apart = bootstrap_pairs(np.repeat([[0.0], [1.0]], n, 1))
    assert (apart.low, apart.high) == (0.0, 1.0)  # two pairs that differ wholly: each may be drawn twice


def test_records_that_differ_in_a_setting_are_not_averaged():
    from report_records import runs

    records = runs(("lora",), ("sst2",)) + runs(("lora",), ("sst2",), lora_r=8)
    names = [(g.name, len(g.records)) for g in grouped(records)]
    assert names == [("LoRA (lora_r 4)", 3), ("LoRA (lora_r 8)", 3)]


def test_a_record_from_before_a_setting_had_its_default():
    from report_records import runs

    records = runs(("lora",), ("sst2",))
    records[0].config["load_in_4bit"] = False
    assert [len(g.records) for g in grouped(records)] == [3]
    records[0].config["load_in_4bit"] = True
    assert sorted(len(g.records) for g in grouped(records)) == [1, 2]


def test_a_run_counts_once_wherever_it_lies():
    from report_records import runs

    again = runs(("lora",), ("sst2",), output_dir="elsewhere", data_root="there")
    for r in again:
        r.metrics["test/sst2/accuracy"] = 1.0
    newer = [dataclasses.replace(r, created="2027" + r.created[4:]) for r in again]
    (g,) = grouped(newer + runs(("lora",), ("sst2",)))
    assert len(g.records) == 3 and {r.metrics["test/sst2/accuracy"] for r in g.records} == {1.0}


def test_records_on_other_examples_are_another_task():
    """How many there are is what a record holds of its test set."""
    from report_records import runs

    records = runs(("lora",), ("sst2",))
    for r in runs(("lora",), ("sst2",)):
        r.data["correct/test/sst2"] += "1"
        records.append(r)
    groups = grouped(records)
    assert [g.task for g in groups] == ["sst2 (n = 50)", "sst2 (n = 51)"] and {g.task_key for g in groups} == {"sst2"}
