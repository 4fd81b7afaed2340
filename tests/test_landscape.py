"""The landscape protocol, its commands, tables and pictures."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from examples import tiny_adapter

from copra_llm.bands import pair_band
from copra_llm.cli import main
from copra_llm.errors import InputError
from copra_llm.protocols import runs as protocol_runs
from copra_llm.protocols.landscape import Plan, run_plan
from copra_llm.protocols.plans import read_plans
from copra_llm.results import Result, read_result
from copra_llm.saved_runs import find_runs
from copra_llm.summaries.landscape import layerwise_table, plane_table, similarity_table
from copra_llm.summaries.landscape_plots import draw

ROOT = Path(__file__).resolve().parents[1]
PLAN = Plan(
    tasks=["sst2"],
    methods=["copra"],
    seeds=[0, 1, 2],
    points=3,
    plane_tasks=["sst2"],
    grid=2,
    train_tasks=["sst2"],
    learning_rate=[1e-2],
    max_steps=4,
    settings={"lora_r": 2, "max_length": 32, "max_train_samples": 16, "max_eval_samples": 6, "checkpoint_at": [0.25]},
)


# --- the protocol on a tiny model -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tiny_llama, tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """Results and runs of the plan, once done, and what was said."""
    folder, said = tmp_path_factory.mktemp("landscape"), []
    run_plan(str(tiny_llama), PLAN, folder / "results", folder / "runs", "sample", said.append)
    return folder / "results", folder / "runs", said


def test_every_analysis_leaves_its_record(folders, tiny_llama):
    results, runs, _ = folders
    place = results / tiny_llama.name / "sst2"
    assert sorted(str(p.relative_to(place)) for p in place.rglob("*.json")) == sorted(
        [f"copra/layerwise-fusion-lr0.01-steps4-seeds{i}-{j}.json" for i, j in itertools.permutations(range(3), 2)]
        + [f"copra/lr0.01-steps4-seed{i}.json" for i in range(3)]
        + ["copra/plane-lr0.01-steps4-seeds0-1-2.json", "similarity-delta.json", "similarity-factors.json"]
    )
    assert len(find_runs(runs)) == 3


def test_records_hold_what_their_names_say(folders, tiny_llama):
    """Pairs in both orders share the whole line, mirrored; a plane's corners are the runs' own test metrics."""
    place = folders[0] / tiny_llama.name / "sst2"
    there, back = (read_result(place / f"copra/layerwise-fusion-lr0.01-steps4-seeds{p}.json") for p in ("0-1", "1-0"))
    assert there.data["whole_loss"] == back.data["whole_loss"][::-1]
    assert there.data["loss"] != back.data["loss"] and there.config["seeds"] == [0, 1]
    plane = read_result(place / "copra/plane-lr0.01-steps4-seeds0-1-2.json")
    for seed, corner in enumerate(plane.data["corners"]):
        single = read_result(place / f"copra/lr0.01-steps4-seed{seed}.json")
        assert corner["label"] == f"seed {seed}"
        assert corner["accuracy"] == single.metrics["test/sst2/accuracy"]
        assert corner["loss"] == pytest.approx(single.metrics["test/sst2/loss"], abs=1e-6)
    similar = read_result(place / "similarity-delta.json")
    assert (
        [p["seed"] for p in similar.data["points"]] == [0, 1, 2] == [e["seed"] for e in similar.data["early_distance"]]
    )
    assert 0 < similar.metrics["early_distance/copra"] < 2


def test_records_hold_no_local_folder(folders, tiny_llama):
    for file in folders[0].rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        for folder in (folders[0].parent, tiny_llama.parent, Path.home(), ROOT):
            assert str(folder) not in text, file


def test_nothing_is_done_twice_and_what_is_missing_is_done(folders, tiny_llama, tmp_path, monkeypatch):
    """A lost record is measured anew, equal to the old one; a run that has come is compared with the others."""
    results, runs = (shutil.copytree(folder, tmp_path / folder.name) for folder in folders[:2])
    monkeypatch.setattr(protocol_runs, "train_adapter", lambda *a: pytest.fail("nothing is trained twice"))

    def changed() -> set[str]:
        before = {f: f.stat().st_mtime_ns for f in results.rglob("*.json")}
        run_plan(str(tiny_llama), PLAN, results, runs, "sample", lambda text: None)
        return {f.name for f in results.rglob("*.json") if before.get(f) != f.stat().st_mtime_ns}

    assert changed() == set()
    (lost,) = results.rglob("layerwise-*-seeds2-0.json")
    before = read_result(lost)
    lost.unlink()
    assert changed() == {lost.name}
    assert read_result(lost).data == before.data
    first = runs / tiny_llama.name / "sst2" / "copra" / "lr0.01-steps4-seed0"
    shutil.copytree(first, first.parent / "another")
    (first.parent / "another" / "result.json").unlink()
    settings = (first / "config.yaml").read_text(encoding="utf-8").replace("learning_rate: 0.01", "learning_rate: 1.0")
    (first.parent / "another" / "config.yaml").write_text(settings, encoding="utf-8")
    assert changed() == {"similarity-delta.json", "similarity-factors.json"}
    assert read_result(next(results.rglob("similarity-delta.json"))).config["adapters"] == 4


# --- plans as files ---------------------------------------------------------------------------------------


def test_the_committed_plan_is_read():
    plans = read_plans(ROOT / "eval" / "landscape" / "plan.yaml", Plan)
    assert plans.keys() == {"minilm"} and len(plans["minilm"].seeds) == 3


GOOD = """minilm: {tasks: [sst2], methods: [lora], seeds: [0, 1, 2], points: 3, plane_tasks: [sst2], grid: 3,
 train_tasks: [], learning_rate: [], max_steps: 9, settings: {lora_r: 2}}"""


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("tasks: [sst2], m", "m", "the plan of minilm lacks tasks"),
        ("grid: 3", "grid: 3, size: 2", "has the unknown entry size"),
        ("plane_tasks: [sst2]", "plane_tasks: [sst3]", 'no task "sst3"'),
        ("methods: [lora]", "methods: []", "methods is empty"),
        ("methods: [lora]", "methods: [lara]", "'lara'"),
        ("seeds: [0, 1, 2]", "seeds: [0, 1]", "two different ones, a plane three"),
        ("points: 3", "points: 4", "line of 4 points"),
        ("grid: 3", "grid: 1", "grid is 1"),
        ("grid: 3", "grid: wide", "grid is 'wide', but must be of type int"),
        ("lora_r: 2", "lora_rank: 2", 'no setting "lora_rank"'),
        ("minilm: {", "minilm: 3\nother: {", "minilm is 3"),
    ],
)
def test_a_plan_that_is_wrong_is_refused(old, new, expected, tmp_path):
    assert old in GOOD
    (tmp_path / "plan.yaml").write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError) as refusal:
        read_plans(tmp_path / "plan.yaml", Plan)
    assert expected in str(refusal.value)


# --- tables and pictures ----------------------------------------------------------------------------------


def layer_record(label: str, seeds: tuple[int, int], losses: tuple[float, float], whole: float) -> Result:
    where = "test/sst2"
    metrics = {}
    for quantity, factor in (("accuracy", 10.0), ("loss", 1.0)):
        name = f"{where}/{quantity}_averaging_barrier"
        metrics |= {f"{name}/encoder.layer.{i}": factor * loss for i, loss in enumerate(losses)}
        metrics |= {f"{name}_mean": factor * sum(losses) / 2, f"{name}_whole": factor * whole}
    config = {"model_name_or_path": "tiny", "task": "sst2", "label": label, "split": "test", "seeds": list(seeds)}
    return Result("layerwise", config, metrics, data={"layers": ["encoder.layer.0", "encoder.layer.1"]})


LAYERS = [
    layer_record("lora", seeds, (0.1 + i / 100, 0.3 + i / 100), 0.8 + i / 10)
    for i, seeds in enumerate(itertools.permutations(range(3), 2))
] + [layer_record("copra", (0, 1), (0.0, -0.1), -0.1)]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


def test_the_layers_table_is_means_over_pairs_with_intervals():
    lora, copra = cells(layerwise_table(LAYERS))
    band = pair_band([0.8 + i / 10 for i in range(6)], list(itertools.permutations(range(3), 2)))
    assert lora[:3] == ["tiny", "sst2", "LoRA"] and copra[2] == "CopRA"
    assert lora[6] == f"{band.mean:.3f} [{band.low:.3f}, {band.high:.3f}]"
    assert lora[8] == "0.325 (layer.1)" and lora[5] == "3.2 (layer.1)"
    assert lora[9] == f"{(0.125 + 0.325) / 1.05:.2f}"
    assert copra[3] == "-1.0" and copra[9] == "–", "one pair has no interval, and nothing is lost"
    assert layerwise_table([]) == plane_table([]) == similarity_table([]) == ""


def plane_of(label: str) -> Result:
    corners = [{"label": f"seed {i}", "x": x, "y": y, "accuracy": 90.0 + i, "loss": 0.1 * (i + 1)}
               for i, (x, y) in enumerate(((0.0, 0.0), (3.0, 0.0), (0.0, 4.0)))]  # fmt: skip
    data = {"x": [-1.0, 1.0, 4.0], "y": [-1.0, 5.0], "accuracy": [[50.0, 60.0, 70.0], [40.0, 30.0, 20.0]],
            "loss": [[1.0, None, 0.5], [0.6, 0.7, 9.0]], "corners": corners,
            "centre": {"label": "centre", "x": 1.0, "y": 4 / 3, "accuracy": 80.0, "loss": 0.4}}  # fmt: skip
    return Result("plane", {"model_name_or_path": "tiny", "task": "sst2", "label": label}, {}, data=data)


def test_the_planes_table():
    """Distances 3, 4 and 5."""
    assert cells(plane_table([plane_of("lora")])) == [["tiny", "sst2", "LoRA", "91.0", "80.0", "0.20", "0.40", "4.0"]]


def similar() -> Result:
    def who(method, seed, rate=0.1):
        return {"method": method, "seed": seed, "learning_rate": rate, "steps": 8, "label": f"run-{seed}"}

    points = [who("copra", 0), who("lora", 0), who("copra", 1), who("copra", 2, 0.2)]
    cosine = np.eye(4)
    cosine[0, 2] = cosine[2, 0] = 0.4
    data = {"points": [p | {"x": float(i), "y": None if i == 3 else 1.0} for i, p in enumerate(points)],
            "cosine": cosine.tolist(),
            "early_distance": [points[i] | {"distance": 0.5 + i} for i in (0, 2)]}  # fmt: skip
    return Result("similarity", {"model_name_or_path": "tiny", "tasks": ["sst2"], "on": "delta"}, {}, data=data)


def test_the_similarity_table_has_runs_that_differ_in_their_seed_alone():
    assert cells(similarity_table([similar()])) == [
        ["tiny", "sst2", "ΔW", "CopRA", "0.1, 8", "0.40", "1.50 (0.50 to 2.50)"]
    ]


def test_pictures_are_functions_of_the_records(tmp_path):
    """A loss that was not finite, a place without t-SNE and a single pair do no harm."""
    point = similar().data["points"]
    point[3] |= {"x": float("nan"), "y": float("nan")}
    odd = dataclasses.replace(similar(), data=similar().data | {"points": point})
    records = [*LAYERS, plane_of("lora"), plane_of("copra"), odd]
    first, again = (draw(records, tmp_path / name) for name in ("first", "again"))
    assert [p.name for p in first] == [f"{name}.{kind}" for name in ("layers", "planes", "similarity-sst2")
                                       for kind in ("png", "svg")]  # fmt: skip
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    assert first[0].read_bytes().startswith(b"\x89PNG") and "<svg" in first[1].read_text(encoding="utf-8")


# --- commands ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tiny_bert, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("three")
    return [str(tiny_adapter(tiny_bert, folder / str(seed), seed)) for seed in (1, 2, 3)]


DATA = ["--task", "sst2", "--data_root", "sample", "--max_length", "24", "--max_eval_samples", "4"]


def test_layerwise_lines_by_command(three, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["interpolate", *three[:2], "--layerwise", "--points", "3", *DATA, "--output", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {"layer-0.json", "layers.png", "layers.svg"}
    record = read_result(out / "layer-0.json")
    assert record.protocol == "layerwise" and len(record.data["layers"]) == 12
    assert "test/sst2/loss_averaging_barrier/encoder.layer.11: " in capsys.readouterr().out


def test_a_plane_by_command(three, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["landscape", *three, "--grid", "2", "--labels", "a", "b", "c", *DATA, "--output", str(out)]
    assert main(words) == 0
    assert {p.name for p in out.iterdir()} == {"plane.json", "plane.png", "plane.svg"}
    record = read_result(out / "plane.json")
    assert [c["label"] for c in record.data["corners"]] == ["a", "b", "c"] and record.config["adapters"] == three
    assert "evaluations: 8.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, expected",
    [
        (["interpolate", "A", "--layerwise"], "a line has two ends"),
        (["interpolate", "A", "B", "--layerwise", "--points", "4"], "line of 4 points"),
        (["interpolate", "A", "B", "--layerwise", "--method", "fusoin"], 'did you mean "fusion"?'),
        (["landscape", "A", "B"], "2 adapters were given, but a plane goes through three"),
        (["landscape", "A", "B", "A"], "lie on one line"),
        (["landscape", "A", "B", "C", "--grid", "1"], "grid of 1 x 1"),
        (["landscape", "A", "B", "C", "--margin", "-1"], "margin is -1"),
        (["landscape", "A", "B", "missing"], "missing is not a folder"),
        (["landscape", "A", "B", "C", "--labels", "a"], "expected 3 arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_leaves_nothing(words, expected, three, tmp_path, capsys):
    named = {"A": three[0], "B": three[1], "C": three[2]}
    assert main([*(named.get(word, word) for word in words), *DATA, "--output", str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
