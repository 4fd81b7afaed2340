"""How alike adapters are, from their factors alone: `copra_llm.similarity`, and the runs they come from."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from examples import MODULES, peft_adapter, random_adapter, save_run, save_runs

from copra_llm.adapters import AdapterWeights, LoraFactors, save_adapter_weights
from copra_llm.cli import main
from copra_llm.errors import InputError
from copra_llm.results import read_result
from copra_llm.saved_runs import find_runs, read_run
from copra_llm.similarity import (
    cosines,
    default_perplexity,
    distances,
    inner_products,
    relative_distance,
    similarity_record,
    tsne,
)

NAMES = list(MODULES)


def unlike() -> list[AdapterWeights]:
    """Adapters of one base in float64 that differ in ranks, scalings (one negative) and targets."""
    kind = {"dtype": torch.float64}
    return [
        random_adapter(0, **kind),
        random_adapter(1, ranks=7, scalings=0.5, **kind),
        random_adapter(2, ranks=dict(zip(NAMES, (1, 2, 3, 4, 5, 6), strict=True)), scalings=-1.5, **kind),
        random_adapter(3, ranks=dict.fromkeys(NAMES[:2], 3), **kind),
        random_adapter(4, ranks=dict.fromkeys(NAMES[2:], 3), **kind),
    ]


def dense(adapter: AdapterWeights) -> np.ndarray:
    """All of Delta W as one vector; modules that are not adapted are zero."""
    parts = [adapter.factors[n].delta_weight() if n in adapter.factors else torch.zeros(MODULES[n]) for n in NAMES]
    return np.concatenate([part.double().numpy().ravel() for part in parts])


# --- inner products ---------------------------------------------------------------------------------------


def test_inner_products_on_the_factors_are_those_of_the_dense_weights():
    """Float64 in another order of sums: 1e-10 relative to the lengths is 10^5 roundings."""
    vectors = np.stack([dense(a) for a in unlike()])
    products = inner_products(unlike())
    norms = np.linalg.norm(vectors, axis=1)
    assert np.abs(products - vectors @ vectors.T).max() < 1e-10 * norms.max() ** 2
    assert np.abs(cosines(products) - vectors @ vectors.T / np.outer(norms, norms)).max() < 1e-10
    assert products[3, 4] == 0.0, "adapters of disjoint modules are orthogonal"


def test_distances_are_those_of_the_dense_weights():
    vectors = np.stack([dense(a) for a in unlike()])
    apart = distances(inner_products(unlike()))
    expected = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    assert np.abs(apart - expected).max() < 1e-8 * expected.max()
    assert (apart == apart.T).all() and (np.diag(apart) == 0).all()


def test_another_factorisation_is_the_same_adapter_and_another_point():
    """(B P, P^-1 A): Delta W stays, the factors move."""
    one = random_adapter(0, dtype=torch.float64)
    P = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = {n: LoraFactors(torch.linalg.solve(P, f.lora_A), f.lora_B @ P, f.scaling) for n, f in one.factors.items()}
    both = [one, one.with_factors(other, "other")]
    assert cosines(inner_products(both))[0, 1] == pytest.approx(1.0, abs=1e-10)
    assert abs(cosines(inner_products(both, "factors"))[0, 1]) < 0.9


def test_factors_are_compared_entry_by_entry():
    """With one scaling for all it is a common factor, and the sign of a scaling is B's."""
    adapters = [random_adapter(seed, dtype=torch.float64) for seed in range(3)]
    flat = np.stack([np.concatenate([np.r_[f.lora_A.numpy().ravel(), f.lora_B.numpy().ravel()]
                                     for f in a.factors.values()]) for a in adapters])  # fmt: skip
    assert np.abs(inner_products(adapters, "factors") - 2.0 * flat @ flat.T).max() < 1e-10 * (flat**2).sum()
    turned = {n: dataclasses.replace(f, lora_B=-f.lora_B, scaling=-f.scaling) for n, f in adapters[0].factors.items()}
    both = [adapters[0], dataclasses.replace(adapters[0], factors=turned)]
    assert cosines(inner_products(both, "factors"))[0, 1] == pytest.approx(1.0)


def test_relative_distance():
    """Half way there: 1/2; from nothing: 1; beyond or backwards: more."""
    final = random_adapter(0, dtype=torch.float64)

    def times(share: float) -> AdapterWeights:
        scaled = {n: dataclasses.replace(f, lora_B=share * f.lora_B) for n, f in final.factors.items()}
        return dataclasses.replace(final, factors=scaled)

    measured = [relative_distance(final, times(share)) for share in (1.0, 0.5, 0.0, -1.0)]
    assert measured == pytest.approx([0.0, 0.5, 1.0, 2.0], abs=1e-7)  # a difference of squares: root of 1e-16
    with pytest.raises(InputError, match="changes nothing"):
        relative_distance(times(0.0), final)


def edited(adapter: AdapterWeights, **config) -> AdapterWeights:
    return dataclasses.replace(adapter, config=adapter.config | config, source="other")


WRONG = {
    "base": (edited(random_adapter(1), base_model_name_or_path="owner/else"), "delta", "owner/blocks and owner/else"),
    "dora": (edited(random_adapter(1), use_dora=True), "delta", "other is a DoRA adapter"),
    "rank": (random_adapter(1, ranks=5), "factors", "differ in ranks or targets"),
    "targets": (random_adapter(1, ranks={NAMES[0]: 4}), "factors", "differ in ranks or targets"),
    "kind": (random_adapter(1), "deltas", 'on "deltas", but must be on one of delta, factors'),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_compared_is_refused(case):
    other, on, expected = WRONG[case]
    with pytest.raises(InputError) as refusal:
        inner_products([random_adapter(0), other], on)
    assert expected in str(refusal.value)


def test_unequal_shapes_are_refused():
    one = random_adapter(0)
    narrow = {n: dataclasses.replace(f, lora_A=f.lora_A[:, :-1]) for n, f in one.factors.items()}
    with pytest.raises(InputError, match="differ in the shape of"):
        inner_products([one, dataclasses.replace(one, factors=narrow)])


def test_nothing_has_no_direction():
    with pytest.raises(ValueError, match="entry 1 has length 0"):
        cosines(np.diag([1.0, 0.0]))


# --- t-SNE ------------------------------------------------------------------------------------------------


def clusters() -> np.ndarray:
    """Distances of two clusters of five, ten times their width apart."""
    points = np.random.default_rng(0).normal(size=(10, 3)) + np.repeat([[0.0], [10.0]], 5, axis=0)
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def test_tsne_is_a_function_of_its_seed():
    before = np.random.get_state()[1].copy()
    one, again, other = tsne(clusters()), tsne(clusters()), tsne(clusters(), seed=1)
    assert one.shape == (10, 2)
    assert (one == again).all() and not np.allclose(one, other)
    assert (np.random.get_state()[1] == before).all(), "no global generator is moved"


def test_tsne_keeps_neighbours():
    """Every point's four nearest are those of its own cluster."""
    places = tsne(clusters())
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    nearest = np.argsort(apart, axis=1)[:, 1:5]
    assert ((nearest < 5) == (np.arange(10) < 5)[:, None]).all()


def test_perplexity_follows_the_number_of_adapters():
    assert (default_perplexity(4), default_perplexity(10), default_perplexity(500)) == (1.0, 3.0, 30.0)


@pytest.mark.parametrize("points, perplexity, expected", [(3, None, "of 3 adapters"), (5, 5.0, "perplexity is 5"),
                                                          (5, 0.0, "perplexity is 0")])  # fmt: skip
def test_tsne_of_too_little_is_refused(points, perplexity, expected):
    with pytest.raises(InputError, match=expected):
        tsne(np.ones((points, points)) - np.eye(points), perplexity=perplexity)


def test_without_scikit_learn_it_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "sklearn" else find(name, *a))
    with pytest.raises(InputError, match=r"needs scikit-learn: pip install copra_llm\[report\]"):
        tsne(clusters())


# --- runs, records and the command ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return save_runs(tmp_path_factory.mktemp("runs"))


def test_a_record_holds_places_cosines_and_distances(runs):
    record = similarity_record(find_runs(runs), seed=3, note="kept")
    data, config = record.data, record.config
    assert record.protocol == "similarity" and config["note"] == "kept"
    assert (config["on"], config["tsne_seed"], config["adapters"]) == ("delta", 3, 5)
    assert config["tasks"] == ["sst2"] and "method" not in config and "learning_rate" not in config, "shared ones only"
    assert [(p["method"], p["seed"], p["learning_rate"]) for p in data["points"]][-1] == ("lora", 2, 0.1)
    assert all(np.isfinite([p["x"], p["y"]]).all() for p in data["points"])
    cosine = np.array(data["cosine"])
    assert cosine.shape == np.array(data["distance"]).shape == (5, 5)
    assert record.metrics["cosine_between_seeds/lora"] == pytest.approx(cosine[2, 3]), "not with the other rate"
    # float32 factors, and a difference of squares of numbers of one size: some 1e-7.
    assert [(e["method"], e["seed"]) for e in data["early_distance"]] == [("copra", 0), ("copra", 1), ("lora", 0),
                                                                          ("lora", 1)]  # fmt: skip
    assert [e["distance"] for e in data["early_distance"]] == pytest.approx([0.75, 0.75, 0.25, 0.25], abs=1e-6)
    assert record.metrics["early_distance/copra"] == pytest.approx(0.75, abs=1e-6)


def test_an_adapter_that_changes_nothing_is_refused(runs, tmp_path):
    still = save_run(tmp_path / "still", "lora", 5)
    adapter = random_adapter(0)
    zero = {n: dataclasses.replace(f, lora_B=0 * f.lora_B) for n, f in adapter.factors.items()}
    save_adapter_weights(adapter.with_factors(zero, "zero"), still / "adapter")
    with pytest.raises(InputError, match="still changes nothing: its delta is 0"):
        similarity_record([*find_runs(runs), read_run(still)])


def test_the_command_writes_record_and_pictures(runs, tmp_path, capsys):
    """Adapters of any origin; two have cosines but no t-SNE."""
    peft_adapter(tmp_path / "plain", seed=1)
    peft_adapter(tmp_path / "other", seed=2)
    out = tmp_path / "out"
    assert main(["similarity", str(tmp_path / "plain"), str(tmp_path / "other"), "--output", str(out)]) == 0
    record = read_result(out / "similarity.json")
    assert {p.name for p in out.iterdir()} == {"similarity.json", "similarity.png", "similarity.svg"}
    assert [(p["label"], p["method"], p["x"]) for p in record.data["points"]] == [("plain", None, None),
                                                                                  ("other", None, None)]  # fmt: skip
    assert f"plain: cosines 1.000 {record.data['cosine'][0][1]:.3f}" in capsys.readouterr().out
    folders = [str(folder) for folder in sorted(runs.glob("*/*"))]
    assert main(["similarity", *folders, "--on", "factors", "--perplexity", "2", "--output", str(tmp_path / "2")]) == 0
    record = read_result(tmp_path / "2" / "similarity.json")
    assert (record.config["on"], record.config["tsne_perplexity"]) == ("factors", 2.0)
    assert record.config["adapter_folders"] == folders
    assert "early_distance/lora: 0.250" in capsys.readouterr().out


def bad(place: Path, runs: Path) -> dict[str, tuple[list, str]]:
    """Words of the command line, and what is said of them."""
    lora = runs / "lora" / "run-0"
    shutil.copytree(lora, place / "ia3")
    path = place / "ia3" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "IA3"}))
    return {
        "one": ([lora], "nothing to compare it with"),
        "missing": ([lora, place / "gone"], "is not a folder"),
        "kind": ([lora, place / "ia3"], "is a IA3 adapter"),
        "on": ([lora, lora, "--on", "weights"], "must be on one of delta, factors"),
        "perplexity": ([*sorted(runs.glob("*/*")), "--perplexity", "9"], "perplexity is 9 for 5 adapters"),
    }


@pytest.mark.parametrize("case", ["one", "missing", "kind", "on", "perplexity"])
def test_bad_input_is_one_sentence_and_leaves_nothing(case, runs, tmp_path, capsys):
    words, expected = bad(tmp_path, runs)[case]
    assert main(["similarity", *map(str, words), "--output", str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
