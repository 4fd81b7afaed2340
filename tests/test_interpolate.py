"""The line between two adapters: `copra_llm.interpolate`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from examples import tiny_adapter

import copra_llm.build
from copra_llm.adapters import load_adapter_weights
from copra_llm.build import build
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.estimates import bootstrap_mean
from copra_llm.evaluate import evaluate
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.interpolate import Curve, curve_record, interpolate, line
from copra_llm.results import unpack_bits

# --- barriers on a curve made by hand ---------------------------------------------------------------------

# Rows: alpha = 0 (the second adapter alone), 1/4, 1/2, 1 (the first alone); columns: ten examples.
ACCURACY = (40.0, 30.0, 50.0, 80.0)
LOSS = (1.0, 1.5, 0.5, 0.2)


@pytest.fixture
def curve() -> Curve:
    correct = np.array([[i < a / 10 for i in range(10)] for a in ACCURACY])
    nll = np.array([np.linspace(0.0, 2 * loss, 10) for loss in LOSS])
    return Curve(np.array([0.0, 0.25, 0.5, 1.0]), correct, nll)


def test_accuracy_and_loss_are_means_over_examples(curve):
    assert curve.accuracy == pytest.approx(ACCURACY)
    assert curve.loss == pytest.approx(LOSS)


def test_accuracy_barrier_is_the_depth_below_the_chord(curve):
    """Chord 40, 50, 60, 80; depths 0, 20, 10, 0. With the ends exchanged it would be 40, not 20."""
    assert curve.accuracy_barrier() == pytest.approx(20.0)


def test_loss_barrier_is_the_height_above_the_chord(curve):
    """Chord 1.0, 0.8, 0.6, 0.2; heights 0, 0.7, -0.1, 0."""
    assert curve.loss_barrier() == pytest.approx(0.7)


def test_no_barrier_where_the_line_is_better_than_its_ends():
    """The ends count: a barrier is never negative."""
    correct = np.array([[False, True], [True, True], [True, False]])
    curve = Curve(np.array([0.0, 0.5, 1.0]), correct, np.where(correct, 0.1, 2.0))
    assert curve.accuracy_barrier() == 0.0
    assert curve.loss_barrier() == 0.0
    assert curve.middle_drop()[0] == -50.0


def test_middle_drop_is_taken_at_one_half(curve):
    """Mean of the ends (40 and 80) minus the middle (50), inside its interval."""
    drop, low, high = curve.middle_drop()
    assert drop == pytest.approx(10.0)
    assert low < drop < high


def test_a_curve_without_its_middle_has_no_middle_drop():
    """No other point stands in for alpha = 0.5."""
    outcomes = np.ones((2, 4), dtype=bool)
    with pytest.raises(ValueError, match="middle"):
        Curve(np.array([0.0, 1.0]), outcomes, outcomes * 0.1).middle_drop()


@pytest.mark.parametrize("points", [3, 5, 11, 21, 99, 101])
def test_line_has_both_ends_and_the_middle(points):
    alphas = line(points)
    assert len(alphas) == points and alphas[0] == 0.0 and alphas[-1] == 1.0
    assert (np.diff(alphas) > 0).all()
    assert np.isclose(alphas, 0.5).any()


@pytest.mark.parametrize("points", [-3, 0, 1, 2, 4, 20])
def test_line_without_ends_or_middle_is_refused(points):
    with pytest.raises(InputError, match=f"line of {points} points"):
        line(points)


# --- bootstrap --------------------------------------------------------------------------------------------


def test_bootstrap_interval_has_the_textbook_width():
    """For 400 normal numbers +- 1.96 sd / sqrt(n), within the noise of 2000 draws (measured: 5 %)."""
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    mean, low, high = bootstrap_mean(values)
    assert mean == values.mean() and low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_bootstrap_of_a_constant_is_a_point():
    assert bootstrap_mean(np.full(30, 2.5)) == (2.5, 2.5, 2.5)


def test_bootstrap_is_a_function_of_its_seed():
    values = np.arange(50.0)
    assert bootstrap_mean(values) == bootstrap_mean(values) != bootstrap_mean(values, seed=1)


# --- tiny models on the packaged sample -------------------------------------------------------------------

KINDS = ("tiny_llama", "tiny_bert")


@pytest.fixture(scope="module", params=KINDS)
def ends(request, tmp_path_factory) -> tuple[RunConfig, list[Path]]:
    """A model and two adapters for it whose answers differ."""
    model = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("ends")
    config = RunConfig().replace(
        model_name_or_path=str(model), data_root="sample", max_length=48, max_eval_samples=20, max_train_samples=20
    )
    return config, [tiny_adapter(model, folder / str(seed), seed) for seed in (1, 2)]


def alone(config: RunConfig, folder: Path):
    bench = build(config, ["sst2"], adapter=folder, splits=("test",))
    return evaluate(Accelerator(), bench.classifier, bench.splits["test"]["sst2"], 8)


def along(config: RunConfig, folders: list[Path], method: str, points: int = 3) -> Curve:
    ends = map(load_adapter_weights, folders)
    return interpolate(*ends, evaluator_of(config), "sst2", method=method, alphas=line(points))


def evaluator_of(config: RunConfig) -> AdapterEvaluator:
    return AdapterEvaluator(config.replace(per_device_eval_batch_size=8), ["sst2"], "test")


@pytest.mark.parametrize("method", ["fusion", "mixture"])
def test_ends_are_the_adapters_alone_and_alpha_weighs_the_first(ends, method):
    """alpha = 1 is the first adapter, alpha = 0 the second: the same outcome for every example.

    In fusion the factors at the ends are the adapter's own, so the losses agree bit for bit; a mixture has the
    scaling inside B and sums over twice the rank in an order that is the machine's (measured here: no difference).
    """
    config, folders = ends
    curve = along(config, folders, method)
    first, second = (alone(config, folder) for folder in folders)
    assert not np.allclose(first.nll, second.nll, rtol=0, atol=1.0)
    for outcomes, point in ((first, -1), (second, 0)):
        assert np.array_equal(curve.correct[point], outcomes.correct)
        if method == "fusion":
            assert np.array_equal(curve.nll[point], outcomes.nll)
        else:
            assert np.allclose(curve.nll[point], outcomes.nll, rtol=0, atol=1e-4)


def test_exchanging_the_adapters_mirrors_the_line(ends):
    config, folders = ends
    there, back = (along(config, order, "fusion") for order in (folders, folders[::-1]))
    assert np.array_equal(there.nll, back.nll[::-1])


def test_the_model_is_loaded_once_for_all_points(ends, monkeypatch):
    """Only weights are swapped; the progress bar sees every point."""
    config, folders = ends
    loads, seen = [], []
    load_base = copra_llm.build.load_base
    monkeypatch.setattr(copra_llm.build, "load_base", lambda s: loads.append(s) or load_base(s))

    def progress(points):
        for point in points:
            seen.append(point)
            yield point

    ends = map(load_adapter_weights, folders)
    curve = interpolate(*ends, evaluator_of(config), "sst2", method="fusion", alphas=line(5), progress=progress)
    assert len(loads) == 1
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert curve.correct.shape == curve.nll.shape == (5, 20)


def test_adapters_of_unequal_rank_are_interpolated_by_mixture(ends, tmp_path):
    """Every point has the shapes of the middle one."""
    config, folders = ends
    wider = tiny_adapter(Path(config.model.model_name_or_path), tmp_path / "wide", seed=3, r=6)
    curve = along(config, [folders[0], wider], "mixture")
    assert np.array_equal(curve.correct[-1], alone(config, folders[0]).correct)
    assert np.array_equal(curve.correct[0], alone(config, wider).correct)


def test_adapters_that_do_not_fit_are_refused_before_the_model_is_loaded(ends, tmp_path):
    config, folders = ends
    wider = tiny_adapter(Path(config.model.model_name_or_path), tmp_path / "wide", seed=3, r=6)

    evaluator = evaluator_of(config)
    with pytest.raises(InputError, match="rank: 4 and 6"):
        interpolate(*map(load_adapter_weights, (folders[0], wider)), evaluator, "sst2", method="fusion", alphas=line(3))
    with pytest.raises(ValueError, match="no adapter has been attached"):
        _ = evaluator.bench


def test_record_of_a_curve(ends):
    """The points, the outcomes of every example, and metrics that follow from them."""
    config, folders = ends
    evaluator, ends = evaluator_of(config), map(load_adapter_weights, folders)
    curve = interpolate(*ends, evaluator, "sst2", method="fusion", alphas=line(5))
    record = curve_record(curve, {"split": "test", "task": "sst2"}, evaluator, seconds=1.5)
    assert record.protocol == "interpolation" and record.seconds == 1.5
    assert record.data["alpha"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [unpack_bits(row) for row in record.data["correct"]] == curve.correct.astype(int).tolist()
    m = {name.removeprefix("test/sst2/"): value for name, value in record.metrics.items()}
    assert (m["accuracy@0"], m["accuracy@0.5"], m["accuracy@1"]) == tuple(curve.accuracy[[0, 2, 4]])
    assert (m["loss@0"], m["loss@0.5"], m["loss@1"]) == tuple(curve.loss[[0, 2, 4]])
    assert m["accuracy_barrier"] == curve.accuracy_barrier() and m["loss_barrier"] == curve.loss_barrier()
    assert (m["middle_drop"], m["middle_drop_low"], m["middle_drop_high"]) == curve.middle_drop()
    assert record.environment["base_fingerprint"] == evaluator.bench.base.fingerprint
