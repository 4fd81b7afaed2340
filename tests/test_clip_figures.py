"""The paper's figures on images, from plans to tables, on a tiny model; and the shipped plans."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from image_examples import TASK, write_images

from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.protocols.clip import FIGURES, SCALES, SETTINGS, entries, run_figures
from copra_llm.report import find_results
from copra_llm.summaries.clip import few_shot_table
from copra_llm.tasks.clip.catalogue import image_task_names

ROOT = Path(__file__).resolve().parents[1]
PLANS = ROOT / "eval" / "clip" / "plans"
OTHER = "oxford_pets"
SHORT = {"max_steps": 4, "learning_rate": 0.02, "per_device_train_batch_size": 3, "checkpoint_at": [0.25]}
GRID = {"model": "-", "tasks": [TASK], "seeds": [0, 1], "points": {"fusion": 3}, "max_steps": [4],
        "variants": {"lora": {"method": "lora"}, "copra": {"method": "copra"}}, "settings": SHORT}  # fmt: skip
TINY = {
    "figure-3": {"tasks": [TASK, OTHER], "methods": ["lora", "copra"], "seeds": [0, 1], "learning_rate": [0.02],
                 "max_steps": [4], "points": {"fusion": 3, "align": 3, "mixture": 3}, "settings": SHORT},
    "figure-2": {"tasks": [TASK], "methods": ["lora"], "seeds": [0], "budget": 128, "max_eval_samples": 8,
                 "per_device_eval_batch_size": 8, "split": "test", "metrics": ["loss"]},
    "figure-4": {"tasks": [TASK], "methods": ["copra"], "seeds": [0], "densities": [0.5], "by": ["magnitude"],
                 "quantise": ["nf4"], "early_tasks": [TASK], "early_methods": ["copra"]},
    "figure-5-rates": GRID | {"learning_rate": [0.01, 0.02]},
    "figure-5-similarity": {"tasks": [TASK], "methods": ["lora"], "seeds": [0, 1], "points": 3, "plane_tasks": [],
                            "grid": 2, "train_tasks": [], "learning_rate": [], "max_steps": 1, "settings": {}},
    "figure-6-grid": GRID | {"learning_rate": [0.02], "max_steps": [2, 4]},
    "figure-6-steps": GRID | {"learning_rate": [0.02], "fractions": [0.5, 1.0]},
    "table-1-federated": {"model": "-", "tasks": [TASK], "methods": ["lora"], "seeds": [0], "clients": 2,
                          "merges": {"fusion": {}}, "settings": SHORT},
    "table-1-multitask": {"model": "-", "groups": [[TASK, OTHER]], "methods": ["copra"], "seeds": [0],
                          "merges": {"fusion": {}}, "settings": SHORT},
    "ablations": GRID | {"learning_rate": [0.02],
                         "variants": {"stochastic-depth": {"method": "lora", "stochastic_depth": 0.5},
                                      "adapter-dropout": {"ramp_shape": "constant", "p_start": 0.5}}},
    "ablations-pruned": {"tasks": [TASK], "methods": [], "variants": ["stochastic-depth"], "seeds": [0],
                         "densities": [], "by": [], "quantise": [], "early_tasks": [], "early_methods": []},
}  # fmt: skip
"""A plan of every part, with 4 shots."""


def write_plans(folder: Path, plans: dict, entry: str = "small-4") -> Path:
    folder.mkdir(parents=True)
    for name, plan in plans.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({entry: plan}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def done(tiny_clip, tmp_path_factory):
    """All figures at the tiny plans: folder of the records, of the work, and a function that does it again."""
    folder = tmp_path_factory.mktemp("figures")
    root = write_images(folder / "images", counts={"train": 8, "val": 3, "test": 5})
    write_images(root, counts={"train": 8, "val": 3, "test": 5}, place=OTHER, split_file="split_zhou_OxfordPets.json")
    plans = write_plans(folder / "plans", TINY)
    said: list[str] = []

    def run(figures=tuple(FIGURES), **changes):
        settings = {"model": str(tiny_clip), "data_root": str(root), "say": said.append, "workers": 1}
        run_figures(figures, "small", plans, folder / "results", folder / "work", **settings | changes)

    run()
    return folder, said, run


@pytest.mark.parametrize(
    ("protocol", "place"),
    [
        ("train", f"{TASK}/lora"),
        ("train", f"{OTHER}/copra"),
        ("train", f"{TASK}/stochastic-depth"),
        ("train", f"sweeps/*/{TASK}/copra"),
        ("interpolation", f"{TASK}/copra"),
        ("interpolation", f"{TASK}/adapter-dropout"),
        ("shapley", f"{TASK}/lora"),
        ("pruning", f"pruned/*/{TASK}/copra"),
        ("pruning", f"pruned/*/{TASK}/stochastic-depth"),
        ("merge_over_steps", f"sweeps/*/{TASK}/lora"),
        ("similarity", f"sweeps/*/{TASK}"),
        ("layerwise", f"sweeps/*/{TASK}/lora"),
        ("federated", f"{TASK}/lora"),
        ("multitask", f"{TASK}+{OTHER}/copra"),
    ],
)
def test_every_figure_leaves_its_records(done, protocol, place):
    results = done[0] / "results" / "4-shots"
    folders = list(results.glob(place if "/*/" in place else f"*/{place}"))
    assert len(folders) == 1
    records = [r for r in find_results(folders) if r.protocol == protocol]
    assert records and all(str(done[0]) not in str(r.config) for r in records)
    settings = {**SETTINGS, **SCALES["small"].settings}
    for r in records:
        assert r.config.get("shots", 4) == 4 and r.config.get("lora_r", 8) == settings["lora_r"]


def test_what_has_a_record_is_not_done_again(done):
    folder, said, run = done
    before = {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*.json")}
    said.clear()
    run()
    assert {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*.json")} == before
    assert not [line for line in said if ".json:" in line]


def test_the_table(done):
    """One row a task and method; what was merged stands beside what was not."""
    table = few_shot_table(find_results([done[0] / "results" / "4-shots" / "tiny_clip0"]))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0][2:7] == ["chance", "shots", "method", "lr, steps", "accuracy"]
    assert [row[1:5] for row in rows[2:]] == [
        [TASK, "10", "4", "LoRA"], [TASK, "10", "4", "CopRA"], [TASK, "10", "4", "adapter-dropout"],
        [TASK, "10", "4", "stochastic-depth"], [OTHER, "3", "4", "LoRA"], [OTHER, "3", "4", "CopRA"],
    ]  # fmt: skip
    merged = {row[4]: row[8:] for row in rows[2:6]}
    assert merged["LoRA"][2] == "–" and merged["CopRA"][2] != "–"  # against LoRA
    assert merged["CopRA"][3] != "–" and merged["stochastic-depth"][3] == "–"  # not aligned


# --- what may be asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figures", "scale", "model", "words"),
    [
        (["7"], "small", "here", '"7" is not one of 3, 2, 4, 6'),
        (["3"], "tiny", "here", '"tiny" is not one of paper, small'),
        (["3"], "small", None, "pretrain_micro_clip.py --output_dir runs/micro-clip"),
    ],
)
def test_what_there_is_not_is_refused(tmp_path, monkeypatch, figures, scale, model, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        run_figures(figures, scale, PLANS, tmp_path / "results", tmp_path / "work", model=model)
    assert not list(tmp_path.iterdir())


def test_an_entry_without_shots_is_refused(tmp_path):
    plans = write_plans(tmp_path / "plans", {"figure-3": TINY["figure-3"]}, entry="small")
    with pytest.raises(InputError, match="the entry small is not named <scale>-<shots>"):
        list(entries(plans, FIGURES["3"][0], "small"))


# --- the shipped plans ------------------------------------------------------------------------------------

PARTS = [part for parts in FIGURES.values() for part in parts]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.plan)
def test_shipped_plans_are_whole(part, scale):
    found = list(entries(PLANS, part, scale))
    assert found
    for shots, plan in found:
        tasks = getattr(plan, "tasks", None) or plan.groups[0]
        assert set(tasks) <= set(image_task_names())
        if hasattr(plan, "settings"):
            config = RunConfig().replace(**plan.settings)
            assert config.image.shots == shots
            assert config.lora.lora_dropout == (0.25 if scale == "paper" else 0.0)


def test_the_papers_scale_is_the_papers():
    """Rate 5e-4, 500 steps a shot, five seeds, and one template for all sets."""
    found = dict(entries(PLANS, FIGURES["3"][0], "paper"))
    assert len(found[16].tasks) == 11 and found[16].seeds == [0, 1, 2, 3, 4]
    for shots, plan in found.items():
        assert plan.max_steps == [500 * shots] and plan.learning_rate == [5e-4]
        assert plan.settings["template"] == "a photo of a {}."
