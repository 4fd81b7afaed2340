"""The plane through three adapters: `copra_llm.plane`."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from examples import random_adapter, tiny_adapter

from copra_llm.adapters import AdapterWeights, load_adapter_weights
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.merge import merge
from copra_llm.plane import Plane, landscape, plane_record, plane_through
from copra_llm.results import read_result, write_result


def three(scalings: tuple[float, ...] = (2.0, 2.0, 2.0)) -> list[AdapterWeights]:
    return [random_adapter(seed, scalings=s, dtype=torch.float64) for seed, s in enumerate(scalings)]


def point(adapter: AdapterWeights) -> np.ndarray:
    """All entries of A and B, the scaling shared between them, the sign in B."""
    parts = []
    for f in adapter.factors.values():
        root = abs(f.scaling) ** 0.5
        parts += [root * f.lora_A.numpy().ravel(), np.sign(f.scaling) * root * f.lora_B.numpy().ravel()]
    return np.concatenate(parts)


SCALINGS = [(2.0, 2.0, 2.0), (2.0, 0.5, 3.0), (2.0, -0.5, 3.0)]


# --- coordinates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scalings", SCALINGS)
def test_coordinates_reproduce_distances(scalings):
    """Of float64 factors; 1e-10 relative is far above the roundings of sums of some hundred squares."""
    adapters = three(scalings)
    corners = plane_through(adapters).corners
    for i, j in itertools.combinations(range(3), 2):
        expected = np.linalg.norm(point(adapters[i]) - point(adapters[j]))
        assert np.linalg.norm(corners[i] - corners[j]) == pytest.approx(expected, rel=1e-10)
    assert corners[0].tolist() == [0.0, 0.0] and corners[1, 1] == 0.0 and corners[2, 1] > 0


@pytest.mark.parametrize("scalings", SCALINGS)
@pytest.mark.parametrize("place", [(1.0, 2.0), (-3.0, 7.0), (20.0, -5.0)])
def test_a_fusion_lies_where_its_coordinates_say(scalings, place):
    """Inside the triangle and outside: its distances to the corners are those on the plane."""
    adapters = three(scalings)
    plane = plane_through(adapters)
    weights = plane.weights(*place)
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)
    fused = point(merge(adapters, "fusion", weights))
    for adapter, corner in zip(adapters, plane.corners, strict=True):
        assert np.linalg.norm(fused - point(adapter)) == pytest.approx(np.linalg.norm(place - corner), rel=1e-9)


def test_a_corner_is_one_adapter_exactly_and_the_centre_a_third_of_each():
    for seed in range(20):
        second, x, y = np.random.default_rng(seed).uniform(0.1, 30.0, 3)
        plane = Plane(second, (x - 15.0, y))
        assert [plane.weights(*corner) for corner in plane.corners] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
        assert plane.weights(*plane.centre) == pytest.approx([1 / 3] * 3)


def test_the_grid_encloses_the_corners():
    plane = Plane(4.0, (-1.0, 2.0))
    x, y = plane.grid(6, margin=0.2)
    assert (x[0], x[-1], y[0], y[-1]) == pytest.approx((-2.0, 5.0, -0.4, 2.4))
    assert len(x) == len(y) == 6 and np.ptp(np.diff(x)) < 1e-12
    x, y = plane.grid(3, margin=0.0)
    assert (x.tolist(), y.tolist()) == ([-1.0, 1.5, 4.0], [0.0, 1.0, 2.0])


@pytest.mark.parametrize("points, margin, expected", [(1, 0.2, "grid of 1 x 1"), (3, -0.1, "margin is -0.1"),
                                                      (3, float("nan"), "margin is nan")])  # fmt: skip
def test_a_grid_that_is_none_is_refused(points, margin, expected):
    with pytest.raises(InputError, match=expected):
        Plane(1.0, (0.0, 1.0)).grid(points, margin)


def test_adapters_on_one_line_are_refused():
    """Two equal ones, in each place, or one between the others."""
    a, b, _ = three()
    for adapters in ([a, a, b], [a, b, a], [a, b, b], [a, b, merge([a, b], "fusion")], [a, a, a]):
        with pytest.raises(InputError, match="lie on one line"):
            plane_through(adapters)


def test_only_three_adapters_of_a_common_space_have_a_plane():
    a, b, c = three()
    with pytest.raises(InputError, match="2 adapters were given, but a plane goes through three"):
        plane_through([a, b])
    with pytest.raises(InputError, match="differ in ranks or targets"):
        plane_through([a, b, random_adapter(3, ranks=5)])
    with pytest.raises(InputError, match="different base models"):
        plane_through([a, b, dataclasses.replace(c, config=c.config | {"base_model_name_or_path": "owner/else"})])


# --- a tiny model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corners(tiny_bert, tmp_path_factory) -> tuple[RunConfig, list[AdapterWeights]]:
    folder = tmp_path_factory.mktemp("corners")
    config = RunConfig().replace(
        model_name_or_path=str(tiny_bert), data_root="sample", max_length=32, max_eval_samples=12,
        max_train_samples=8, per_device_eval_batch_size=12,
    )  # fmt: skip
    adapters = [load_adapter_weights(tiny_adapter(tiny_bert, folder / str(seed), seed)) for seed in (1, 2, 3)]
    return config, adapters


@pytest.fixture
def evaluator(corners) -> AdapterEvaluator:
    return AdapterEvaluator(corners[0], ["sst2"], "test")


def test_the_corners_are_the_adapters_alone(corners, evaluator):
    """Bit for bit; the centre is their fusion with equal weights."""
    _, adapters = corners
    seen = landscape(adapters, evaluator, "sst2", points=2)
    alone = [evaluator(adapter, "sst2") for adapter in adapters]
    for corner, one in zip(seen.corners, alone, strict=True):
        assert np.array_equal(corner.nll, one.nll) and np.array_equal(corner.correct, one.correct)
    assert len({one.loss for one in alone}) == 3
    # The centre's weights are 1/3 up to rounding.
    assert seen.centre.loss == pytest.approx(evaluator(merge(adapters, "fusion"), "sst2").loss, abs=1e-5)


def test_the_grid_is_evaluated_where_it_says(corners, evaluator, tmp_path, monkeypatch):
    """Rows are y, columns x; the record states the evaluations spent."""
    config, adapters = corners
    calls, call = [], AdapterEvaluator.__call__
    monkeypatch.setattr(AdapterEvaluator, "__call__", lambda self, w, task: calls.append(task) or call(self, w, task))
    record = plane_record(
        adapters, config, "sst2", points=3, margin=0.5, labels=["a", "b", "c"], settings={"seeds": [1, 2, 3]},
        evaluator=evaluator,
    )  # fmt: skip
    assert record.metrics["evaluations"] == len(calls) == 9 + 4
    data, plane = record.data, plane_through(adapters)
    assert np.array(data["loss"]).shape == np.array(data["accuracy"]).shape == (3, 3)
    for row, column in ((0, 2), (2, 0), (1, 1)):
        fused = merge(adapters, "fusion", plane.weights(data["x"][column], data["y"][row]))
        assert data["loss"][row][column] == evaluator(fused, "sst2").loss
    assert [c["label"] for c in data["corners"]] == ["a", "b", "c"]
    assert [(c["x"], c["y"]) for c in data["corners"]] == [tuple(c) for c in plane.corners.tolist()]
    assert record.metrics["test/sst2/loss_corners"] == pytest.approx(np.mean([c["loss"] for c in data["corners"]]))
    assert record.metrics["test/sst2/accuracy_centre"] == data["centre"]["accuracy"]
    assert record.config["seeds"] == [1, 2, 3] and record.config["margin"] == 0.5
    write_result(tmp_path / "r.json", record)
    assert read_result(tmp_path / "r.json").data == data


def test_what_cannot_be_evaluated_is_refused_before_the_model_is_loaded(corners, evaluator, tiny_bert, tmp_path):
    _, (first, second, third) = corners
    wide = load_adapter_weights(tiny_adapter(tiny_bert, tmp_path / "wide", 4, r=6))
    for adapters, points, expected in (
        ([first, second, wide], 2, "rank: 4 and 6"),
        ([first, second, second], 2, "lie on one line"),
        ([first, second, third], 1, "grid of 1 x 1"),
    ):
        with pytest.raises(InputError, match=expected):
            landscape(adapters, evaluator, "sst2", points=points)
    with pytest.raises(ValueError, match="no adapter has been attached"):
        _ = evaluator.bench
