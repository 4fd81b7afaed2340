"""The commands from end to end on tiny models, and what they say to bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from examples import tiny_adapter
from peft import PeftModel
from safetensors.torch import load_file

import copra_llm.build
from copra_llm.adapters import load_adapter_weights, save_adapter_weights
from copra_llm.cli import COMMANDS, main
from copra_llm.models import PACKAGED
from copra_llm.results import read_result, unpack_bits

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "train_mtl15.py"
SHORT = ["--max_steps", "4", "--max_length", "32", "--max_train_samples", "16", "--max_eval_samples", "8",
         "--per_device_train_batch_size", "4", "--lora_r", "2", "--data_root", "sample"]  # fmt: skip


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
"""Of processes that a test starts: they run this checkout, installed or not."""


def train(*argv: str) -> int:
    """The recipe, in this process."""
    return runpy.run_path(str(RECIPE))["main"]([str(a) for a in argv])


def copra(*argv: str) -> int:
    return main([str(a) for a in argv])


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, every folder with None; hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# --- from training to the report --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tiny_bert, tmp_path_factory) -> Path:
    """Two runs of one model: `lora` by a process of its own, as a user starts it, `copra` in this one."""
    folder = tmp_path_factory.mktemp("runs")
    model = ["--model_name_or_path", str(tiny_bert), "--tasks", "sst2", *SHORT]
    command = [sys.executable, str(RECIPE), *model, "--method", "lora", "--output_dir", str(folder / "lora")]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "test/sst2/accuracy: " in done.stdout
    assert train(*model, "--method", "copra", "--seed", "1", "--learning-rate", "0.05",
                 "--output-dir", folder / "copra") == 0  # fmt: skip
    return folder


def test_a_run_writes_adapter_record_and_config(runs):
    names = {p.name for p in (runs / "lora" / "sst2").iterdir()}
    assert names == {"adapter", "checkpoint-1", "config.yaml", "result.json"}
    record = read_result(runs / "lora" / "sst2" / "result.json")
    assert (record.config["method"], record.steps, record.examples) == ("lora", 4, 16)


@pytest.mark.parametrize("method", ["fusion", "mixture"])
def test_merge(runs, tmp_path, capsys, method):
    """The runs' folders are taken for their adapters; the output is a PEFT adapter of the promised Delta W."""
    out = tmp_path / "merged"
    assert copra("merge", runs / "lora/sst2", runs / "copra/sst2", "--method", method, "--weights", "0.25", "0.75",
                 "--output", out) == 0  # fmt: skip
    assert f"{method} of 2 adapters" in capsys.readouterr().out
    merged, a, b = (load_adapter_weights(f) for f in (out, runs / "lora/sst2", runs / "copra/sst2"))
    name = next(iter(merged.factors))
    x, y, m = (w.factors[name] for w in (a, b, merged))
    if method == "mixture":
        expected = 0.25 * x.delta_weight() + 0.75 * y.delta_weight()
    else:
        lora_A, lora_B = (0.25 * getattr(x, f).double() + 0.75 * getattr(y, f).double() for f in ("lora_A", "lora_B"))
        expected = x.scaling * lora_B @ lora_A
    assert float(abs(m.delta_weight() - expected).max()) < 1e-6  # float32 factors of size 0.1
    assert merged.base_model == a.base_model and merged.heads.keys() == {"sst2.weight"}


def test_merge_of_one_is_that_adapter(runs, tmp_path):
    assert copra("merge", runs / "copra/sst2", "--output", tmp_path / "one") == 0
    folders = runs / "copra/sst2/adapter", tmp_path / "one"
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert before.keys() == after.keys()
    assert all(before[k].numpy().tobytes() == after[k].numpy().tobytes() for k in before)


def test_evaluate_repeats_what_training_reported(runs, tmp_path, capsys):
    """The saved adapter, its head and its settings give the record's metrics and outcomes."""
    out = tmp_path / "deep" / "evaluation.json"
    assert copra("evaluate", runs / "copra/sst2", "--task", "sst2", "--output", out) == 0
    printed = capsys.readouterr().out
    trained, evaluated = read_result(runs / "copra/sst2/result.json"), read_result(out)
    assert evaluated.protocol == "evaluate" and evaluated.config["split"] == "test"
    for name in ("test/sst2/accuracy", "test/sst2/loss"):
        assert evaluated.metrics[name] == pytest.approx(trained.metrics[name], abs=1e-6)
        assert f"{name}: {evaluated.metrics[name]:.3f}" in printed
    assert evaluated.data["correct/test/sst2"] == trained.data["correct/test/sst2"]
    assert evaluated.environment["base_fingerprint"] == trained.environment["base_fingerprint"]


def test_evaluate_takes_flags_over_the_runs_settings(runs, tmp_path):
    argv = ["--task", "sst2", "--split", "dev", "--max-eval-samples", "5", "--output", tmp_path / "e.json"]
    assert copra("evaluate", runs / "copra/sst2/adapter", *argv) == 0
    record = read_result(tmp_path / "e.json")
    assert len(unpack_bits(record.data["correct/dev/sst2"])) == 5
    assert record.config["max_eval_samples"] == 5 and record.config["max_length"] == 32


def test_interpolate_and_report(runs, tmp_path, capsys, monkeypatch):
    """Curves with both ends as trained, the model loaded once a curve; then a page from the records."""
    loads = []
    load_base = copra_llm.build.load_base
    monkeypatch.setattr(copra_llm.build, "load_base", lambda s: loads.append(s) or load_base(s))
    lora, other, out = runs / "lora/sst2", runs / "copra/sst2", tmp_path / "line"
    assert copra("interpolate", other, lora, "--task", "sst2", "--points", "5", "--output", out,
                 "--pair", other, other, "--labels", "between", "same") == 0  # fmt: skip
    assert len(loads) == 2
    assert {p.name for p in out.iterdir()} == {"curve-0.json", "curve-1.json", "curves.png", "curves.svg"}
    between, same = (read_result(out / f"curve-{i}.json") for i in range(2))
    outcomes = {m: read_result(runs / m / "sst2/result.json").data["correct/test/sst2"] for m in ("lora", "copra")}
    assert between.data["correct"][-1] == outcomes["copra"] and between.data["correct"][0] == outcomes["lora"]
    assert set(same.data["correct"]) == {outcomes["copra"]} and same.metrics["test/sst2/accuracy_barrier"] == 0.0
    assert (between.config["label"], between.config["method"], between.config["points"]) == ("between", "copra", 5)
    assert "between test/sst2/accuracy@0.5: " in capsys.readouterr().out

    assert copra("report", runs / "lora", runs / "copra", out, "--output", tmp_path / "report") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report" / "report.html")
    table = (tmp_path / "report" / "table.md").read_text(encoding="utf-8")
    assert "| LoRA | 0.001, 4 | 1 |" in table and "| CopRA | 0.05, 4 |" in table


def test_merged_adapters_are_evaluated_like_any_other(runs, tmp_path):
    """A mixture at (1, 0) answers as the first adapter; settings come by flags, since no run lies beside it."""
    out = tmp_path / "merged"
    assert copra("merge", runs / "copra/sst2", runs / "lora/sst2", "--method", "mixture", "--weights", "1", "0",
                 "--output", out) == 0  # fmt: skip
    assert copra("evaluate", out, "--task", "sst2", "--data_root", "sample", "--max_length", "32",
                 "--max_eval_samples", "8", "--output", tmp_path / "e.json") == 0  # fmt: skip
    trained = read_result(runs / "copra/sst2/result.json")
    assert read_result(tmp_path / "e.json").data["correct/test/sst2"] == trained.data["correct/test/sst2"]


def test_merged_adapters_load_in_plain_peft(runs, tiny_bert, tmp_path):
    from transformers import AutoModel

    assert copra("merge", runs / "copra/sst2", runs / "lora/sst2", "--output", tmp_path / "merged") == 0
    PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_bert), str(tmp_path / "merged"))


# --- help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help(argv, capsys):
    """Every command explains every argument."""
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and text.startswith("usage: copra")
    assert argv or all(name in text for name in COMMANDS)


# --- bad input --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Place:
    """Where a bad-input case may build what it needs; `out` is what must not appear or change."""

    folder: Path
    bert: Path
    llama: Path
    adapters: Path
    """`one` and `two` fit; what is wrong with the others, their names say."""

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def data(self, bad: str, split: str = "train") -> Path:
        """A benchmark's folder whose `split` of sst2 is `bad`."""
        for name in ("train", "dev", "test"):
            path = self.folder / "data" / "sst2" / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(bad if name == split else GOOD * 4, encoding="utf-8", errors="surrogateescape")
        return self.folder / "data"

    def training(self, *more) -> list:
        """A command line of the recipe that would run."""
        return [train, "--model_name_or_path", self.bert, "--tasks", "sst2", *SHORT, "--output_dir", self.out, *more]

    def line(self, *more, first="one", second="two") -> list:
        ends = [self.adapters / first, self.adapters / second]
        settings = ["--task", "sst2", "--data_root", "sample", "--points", "3", "--output", self.out]
        return [copra, "interpolate", *ends, *settings, *more]

    def merging(self, *more, first="one", second="two") -> list:
        return [copra, "merge", self.adapters / first, self.adapters / second, "--output", self.out, *more]

    def evaluation(self, *more, adapter="one") -> list:
        settings = ["--task", "sst2", "--data_root", "sample", "--output", self.out / "e.json"]
        return [copra, "evaluate", self.adapters / adapter, *settings, *more]


GOOD = '{"text": "A fine film.", "label": "Good"}\n{"text": "A dull film.", "label": "Bad"}\n'


@pytest.fixture(scope="module")
def adapters(tiny_bert, tiny_llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        tiny_adapter(tiny_bert, folder / name, seed)
    tiny_adapter(tiny_bert, folder / "wide", 2, r=6)
    tiny_adapter(tiny_llama, folder / "llama", 3)
    for name, changes in {
        "nameless": {"base_model_name_or_path": None},
        "renamed": {"base_model_name_or_path": str(tiny_bert)},
        "lost": {"base_model_name_or_path": str(folder / "gone")},
        "ia3": {"peft_type": "IA3"},
    }.items():
        shutil.copytree(folder / ("llama" if name == "renamed" else "one"), folder / name)
        path = folder / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    one = load_adapter_weights(folder / "one")
    narrow = {n: dataclasses.replace(f, lora_A=f.lora_A[:, :16]) for n, f in one.factors.items()}
    save_adapter_weights(one.with_factors(narrow, "narrow"), folder / "narrow")
    shutil.copytree(folder / "one", folder / "half")
    weights = folder / "half" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    (folder / "empty").mkdir()
    return folder


def copy_of(folder: Path, target: Path, without: str) -> Path:
    shutil.copytree(folder, target)
    (target / without).unlink()
    return target


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def occupied(place: Place) -> Path:
    place.out.mkdir()
    written(place.out / "mine", "precious")
    return place.out


BAD: dict[str, tuple[Callable[[Place], list], list[str]]] = {
    # data
    "line that is not JSON": (
        lambda p: p.training("--data_root", p.data(GOOD + '{"text": \n')),
        ["data/sst2/train.jsonl, line 3 is not JSON"],
    ),
    "missing field": (
        lambda p: p.training("--data_root", p.data(GOOD + '{"label": "Good"}\n', "dev")),
        ["data/sst2/dev.jsonl, line 3", '"text" is missing'],
    ),
    "field of another type": (
        lambda p: p.training("--data_root", p.data('{"text": 3, "label": "Good"}\n', "test")),
        ["data/sst2/test.jsonl, line 1", '"text" is 3, not text'],
    ),
    "unknown label": (
        lambda p: p.training("--data_root", p.data(GOOD + '{"text": "A film.", "label": "Meh"}\n')),
        ["data/sst2/train.jsonl, line 3", '"Meh" is no label of sst2', "Good, Bad"],
    ),
    "line that is not UTF-8": (
        lambda p: p.training("--data_root", p.data(GOOD + '{"text": "\udcff", "label": "Good"}\n')),
        ["data/sst2/train.jsonl, line 3 is not UTF-8 text (byte 11)"],
    ),
    "empty file": (lambda p: p.training("--data_root", p.data("\n")), ["data/sst2/train.jsonl holds no example"]),
    "no data there": (
        lambda p: p.training("--data_root", p.folder / "nowhere"),
        ["--data_root names", "nowhere, which is not a folder"],
    ),
    "no file of the task": (
        lambda p: p.training("--data_root", p.data(GOOD), "--tasks", "rte"),
        ["data/rte/train.jsonl does not exist"],
    ),
    "task without a sample": (lambda p: p.training("--tasks", "yelp"), ["the packaged sample has no yelp"]),
    "unknown task": (lambda p: p.training("--tasks", "sst2", "sst3"), ['no task "sst3" (did you mean "sst2"?)']),
    # models
    "folder without weights": (
        lambda p: p.training("--model_name_or_path", copy_of(p.bert, p.folder / "model", "model.safetensors")),
        ["model holds no weights"],
    ),
    "folder without config": (
        lambda p: p.training("--model_name_or_path", copy_of(p.bert, p.folder / "model", "config.json")),
        ["model has no config.json"],
    ),
    "no such model": (
        lambda p: p.training("--model_name_or_path", "minilmm"),
        ['"minilmm" is no folder', 'did you mean "minilm"?'],
    ),
    "unreachable model": (lambda p: p.training("--model_name_or_path", "no/such"), ['"no/such" could not be loaded']),
    "no dtype": (lambda p: p.training("--dtype", "float33"), ['--dtype is "float33"']),
    "no module matches": (
        lambda p: p.training("--lora_target_modules", "querry"),
        ['--lora_target_modules "querry" (did you mean "query"?)', "it has dense, key, position_embeddings, query"],
    ),
    # settings
    "rank 0": (lambda p: p.training("--lora_r", "0"), ["--lora_r is 0"]),
    "negative steps": (lambda p: p.training("--max_steps", "-5"), ["--max_steps is -5"]),
    "unknown method": (lambda p: p.training("--method", "copa"), ["'copa'", "lora, copra, coto"]),
    "unknown scheduler": (lambda p: p.training("--lr_scheduler_type", "cosin"), ['"cosin" (did you mean "cosine"?)']),
    "unknown tracker": (lambda p: p.training("--report_to", "tensorbord"), ['--report_to "tensorbord"']),
    "unknown granularity": (lambda p: p.training("--granularity", "head"), ["--granularity is 'head'"]),
    "both half precisions": (lambda p: p.training("--bf16", "--fp16"), ["--bf16 and --fp16"]),
    "length too short for the template": (
        lambda p: p.training("--model_name_or_path", p.llama, "--max_length", "1"),
        ["--max_length 1 is too short"],
    ),
    "unknown flag of the recipe": (
        lambda p: p.training("--lora_rank", "4"),
        ['no flag --lora_rank (did you mean "lora_r"?)'],
    ),
    "unknown key in the config": (
        lambda p: p.training("--config", written(p.folder / "c.yaml", "lora_rank: 4")),
        ["c.yaml", 'no setting "lora_rank" (did you mean "lora_r"?)'],
    ),
    "no config": (lambda p: p.training("--config", p.folder / "c.yaml"), ["c.yaml does not exist"]),
    "no checkpoint": (
        lambda p: p.training("--resume_from_checkpoint", p.folder / "gone"),
        ["--resume_from_checkpoint names", "gone, which holds no state.json"],
    ),
    "no layer to switch": (
        lambda p: p.training("--lora_target_modules", "word_embeddings"),
        ["no LoRA module inside a numbered transformer block", "--layer_pattern"],
    ),
    "task named twice": (lambda p: p.training("--tasks", "sst2", "sst2"), ["--tasks names sst2 twice"]),
    "output below a file": (
        lambda p: p.training("--output_dir", written(p.folder / "file", "precious") / "below"),
        ["file"],
    ),
    # commands
    "unknown command": (lambda p: [copra, "merg"], ['no command "merg" (did you mean "merge"?)']),
    "no command": (lambda p: [copra], ["COMMAND", "copra --help"]),
    "unknown flag": (
        lambda p: p.merging("--wieghts", "1", "0"),
        ["--wieghts", 'did you mean "--weights"?', "copra merge --help"],
    ),
    "argument missing": (lambda p: [copra, "merge", p.adapters / "one"], ["--output", "copra merge --help"]),
    "argument of another type": (lambda p: p.line("--points", "many"), ["--points", "'many'"]),
    # merge
    "merge: other base": (
        lambda p: p.merging(second="llama"),
        ["/one and", "/llama have different base models", "tiny_bert", "tiny_llama"],
    ),
    "merge: other shape": (
        lambda p: p.merging(second="narrow"),
        ["/one and", "/narrow differ in the shape of encoder.layer.0.attention.self.key", "(32, 32) and (32, 16)"],
    ),
    "merge: other targets": (lambda p: p.merging(second="renamed"), ["only one of", "adapts", "mixture"]),
    "merge: other rank": (lambda p: p.merging(second="wide"), ["differ in rank: 4 and 6", "--method mixture"]),
    "merge: weights": (lambda p: p.merging("--weights", "1", "1"), ["the weights sum to 2"]),
    "merge: one weight": (lambda p: p.merging("--weights", "1"), ["2 adapters", "1 weights"]),
    "merge: method": (lambda p: p.merging("--method", "tie"), ['no merge method "tie"', "fusion, mixture"]),
    "merge: wrong path": (lambda p: p.merging(second="gone"), ["/gone is not a folder"]),
    "merge: no adapter": (lambda p: p.merging(second="empty"), ["/empty holds no adapter_config.json"]),
    "merge: torn file": (lambda p: p.merging(second="half"), ["half/adapter_model.safetensors is not a whole"]),
    "merge: other kind": (lambda p: p.merging(second="ia3"), ["/ia3 is a IA3 adapter, but must be LORA"]),
    "merge: output not empty": (lambda p: [*p.merging(), "--output", occupied(p)], ["out, which is not empty"]),
    "merge: output is a file": (
        lambda p: [*p.merging(), "--output", written(p.out, "precious")],
        ["out, which is a file"],
    ),
    "merge: output below a file": (
        lambda p: [*p.merging(), "--output", written(p.folder / "file", "precious") / "deep" / "merged"],
        ["file", "give another path"],
    ),
    # interpolate
    "interpolate: points 1": (lambda p: p.line("--points", "1"), ["line of 1 points"]),
    "interpolate: no middle": (lambda p: p.line("--points", "4"), ["line of 4 points"]),
    "interpolate: three adapters": (
        lambda p: [copra, "interpolate", *[p.adapters / "one"] * 3, "--task", "sst2", "--output", p.out],
        ["3 adapters were given", "--pair"],
    ),
    "interpolate: labels": (lambda p: p.line("--labels", "a", "b"), ["2 labels were given for 1 curves"]),
    "interpolate: other base": (lambda p: p.line(second="llama"), ["tiny_bert", "tiny_llama"]),
    "interpolate: second pair": (
        lambda p: p.line("--pair", p.adapters / "one", p.adapters / "wide"),
        ["differ in rank: 4 and 6"],
    ),
    "interpolate: output not empty": (lambda p: [*p.line(), "--output", occupied(p)], ["out, which is not empty"]),
    "interpolate: unknown task": (lambda p: [*p.line(), "--task", "sst3"], ['no task "sst3"']),
    # evaluate
    "evaluate: unknown split": (lambda p: p.evaluation("--split", "valid"), ["--split", "'valid'"]),
    "evaluate: no base named": (
        lambda p: p.evaluation(adapter="nameless"),
        ["/nameless does not say which base model", "--model_name_or_path"],
    ),
    "evaluate: base is gone": (lambda p: p.evaluation(adapter="lost"), ["/gone"]),
    "evaluate: base does not fit": (
        lambda p: p.evaluation("--model_name_or_path", p.llama),
        ["/one does not fit the base model", "tiny_llama"],
    ),
    "evaluate: no examples": (lambda p: p.evaluation("--max_eval_samples", "0"), ["--max_eval_samples is 0"]),
    "evaluate: no batch": (
        lambda p: p.evaluation("--per_device_eval_batch_size", "0"),
        ["--per_device_eval_batch_size is 0"],
    ),
    "evaluate: output is a folder": (
        lambda p: [*p.evaluation(), "--output", occupied(p)],
        ["out, which is a folder"],
    ),
    # report
    "report: wrong path": (lambda p: [copra, "report", p.folder / "gone", "--output", p.out], ["gone is no file"]),
    "report: nothing there": (
        lambda p: [copra, "report", p.adapters / "empty", "--output", p.out],
        ["no result record below"],
    ),
    "report: no record": (
        lambda p: [copra, "report", written(p.folder / "r.json", "{"), "--output", p.out],
        ["r.json, line 1 is not JSON"],
    ),
    "report: newer schema": (
        lambda p: [
            copra, "report", "--output", p.out,
            written(p.folder / "r.json", '{"schema": 9, "metrics": {}, "config": {}, "protocol": "train"}'),
        ],
        ["r.json has schema 9, this version reads up to 1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, adapters, tiny_bert, tiny_llama, tmp_path, capsys, monkeypatch):
    """Exit code 2, one line that names the place or both values, and nothing is left or changed."""
    monkeypatch.delenv("COPRA_DATA", raising=False)
    place = Place(tmp_path, tiny_bert, tiny_llama, adapters)
    command_line, expected = BAD[case]
    command, *argv = command_line(place)
    before = tree(tmp_path), tree(adapters)
    assert command(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert all(part in err for part in expected), err
    assert (tree(tmp_path), tree(adapters)) == before


def test_the_process_ends_with_two_and_one_line(adapters, tmp_path):
    """As a shell sees it, with whatever the libraries have to say on being imported."""
    argv = ["merge", adapters / "one", adapters / "llama", "--output", tmp_path / "out"]
    command = [sys.executable, "-m", "copra_llm.cli", *map(str, argv)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_recipes_help_names_the_packaged_models(capsys):
    """What can be given without a download."""
    with pytest.raises(SystemExit) as stopped:
        train("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in PACKAGED)
