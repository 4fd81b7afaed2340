"""What becomes public of an adapter: all that others need, a card that the Hub reads, and nothing of this machine."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest
import report_records as made
import torch
import yaml
from examples import BASE, peft_adapter, save_run, write_conversations
from hub_server import TOKEN
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from copra_llm.adapter_files import CARD, CONFIG, CONFIG_FILE, HEAD_FILE, PUBLIC, RESULT, WEIGHTS_FILE
from copra_llm.adapters import load_adapter_weights
from copra_llm.cli import main
from copra_llm.config import RunConfig, read_settings
from copra_llm.errors import InputError
from copra_llm.model_card import Adapter, card
from copra_llm.portable import is_local, portable_values
from copra_llm.publish import check_public, hub_base, prepare, push_each
from copra_llm.results import Result, read_result, write_result
from copra_llm.saved_runs import read_run

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
REPO = "tester/adapter"
METRICS = {"dev/sst2/accuracy": 80.0, "test/sst2/accuracy": 75.5, "test/sst2/loss": 0.5, "test/sst2/f1": 0.7}


def run_with_record(folder: Path, method: str = "copra", **settings) -> Path:
    """A run's folder, paths of this machine wherever a run has them."""
    paths = {"model_name_or_path": BASE, "output_dir": str(folder), "data_root": str(folder.parent),
             "init_adapter": str(folder / "earlier"), "metrics": [str(folder / "metric.py")]}  # fmt: skip
    save_run(folder, method, 3, early=0.25, **paths | settings)
    config = read_run(folder).settings
    environment = {"base_model": str(folder / "base"), "world_size": 1}
    data = {"correct/test/sst2": "1101"}
    write_result(folder / RESULT, Result("train", config, METRICS, steps=8, data=data, environment=environment))
    return folder


def ready(path: Path, tmp_path: Path, **options) -> Path:
    """What would be pushed, offline."""
    folder = tmp_path / "ready"
    folder.mkdir()
    prepare(path, folder, REPO, **options)
    return folder


# --- what is in it ----------------------------------------------------------------------------------------


def test_the_files_are_the_runs_without_its_places(tmp_path):
    run = run_with_record(tmp_path / "run")
    folder = ready(run, tmp_path)
    assert {p.name for p in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, CONFIG, RESULT, CARD}
    assert (folder / WEIGHTS_FILE).read_bytes() == (run / "adapter" / WEIGHTS_FILE).read_bytes()
    assert not [p.name for p in folder.iterdir() if str(tmp_path).encode() in p.read_bytes()]
    settings = RunConfig.from_flat(read_settings(folder / CONFIG)).flat()
    changed = {name for name, value in settings.items() if value != read_run(run).settings[name]}
    assert changed == {"output_dir", "data_root", "init_adapter", "metrics"}
    assert (settings["init_adapter"], settings["metrics"], settings["data_root"]) == ("earlier", ["metric.py"], None)
    record = read_result(folder / RESULT)
    assert record.metrics == METRICS and record.environment["base_model"] == BASE


def test_a_checkpoint_does_not_bear_the_metrics_of_the_end(tmp_path):
    run = run_with_record(tmp_path / "run")
    folder = ready(run / "checkpoint-2", tmp_path)
    assert not (folder / RESULT).exists() and (folder / CONFIG).is_file()
    assert ModelCard.load(folder / CARD).data.eval_results is None


def test_the_base_must_be_where_others_find_it(tmp_path, monkeypatch):
    """A folder is refused; --base_model names the hub id in its place, everywhere."""
    (tmp_path / "base").mkdir()
    peft_adapter(tmp_path / "saved", base=str(tmp_path / "base"))
    with pytest.raises(InputError, match=r"is a path of this machine.*--base_model OWNER/NAME"):
        ready(tmp_path / "saved", tmp_path)
    (tmp_path / "ready").rmdir()
    folder = ready(tmp_path / "saved", tmp_path, base_model=BASE)
    assert json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"] == BASE
    assert ModelCard.load(folder / CARD).data.base_model == BASE
    monkeypatch.chdir(tmp_path)
    for name in ("base", "./base", "model.gguf", str(tmp_path / "gone")):
        with pytest.raises(InputError, match="a path of this machine"):
            hub_base(name, "here")
    assert hub_base("gpt2", "here") == "gpt2"


@pytest.mark.parametrize(
    "text, local",
    [
        ("/a/b", True), ("~/a", True), ("./a", True), ("..", True), ("C:\\models", True), ("file:///a", True),
        ("a/b", False), ("a", False), ("https://a/b", False), ("a photo of a {}.", False), ("^model.layers", False),
    ],
)  # fmt: skip
def test_which_texts_are_paths(text, local):
    assert is_local(text) is local
    assert (portable_values({"k": [text, 1]}) == {"k": [text, 1]}) is not local


@pytest.mark.parametrize(
    "file, text, said",
    [
        (RESULT, '{"config": {"x": "/data/me/set"}, "environment": {}}', "/data/me/set, a path of this machine"),
        (CONFIG_FILE, json.dumps({"x": ["../models/m"]}), "../models/m, a path of this machine"),
        (CARD, "line\nuse hf_" + "Q" * 34, "line 2 holds what looks like a token"),
        (CONFIG, "hub_token: sk-proj-abcdefghijklmnopqrst", "what looks like a token"),
        (RESULT, '{"config": {"u": "https://me:pass1@host/x"}, "environment": {}}', "what looks like a token"),
        (CARD, "key: only-in-the-environment", "what looks like a token"),
        (CARD, "see HOME/notes", "a folder of this machine"),
        ("adapter_model.bin", "x", "no file of an adapter"),
    ],
)  # fmt: skip
def test_what_must_not_leave_is_found(tmp_path, monkeypatch, file, text, said):
    """Each alone, in a folder that is fit without it; a secret is never said."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SOME_API_KEY", "only-in-the-environment")
    (tmp_path / "ready").mkdir()
    (tmp_path / "ready" / CARD).write_text("# fit: https://huggingface.co/owner/name, a/b, 1e-3\n")
    check_public(tmp_path / "ready")
    (tmp_path / "ready" / file).write_text(text.replace("HOME", str(Path.home())))
    with pytest.raises(InputError, match=re.escape(said)) as refused:
        check_public(tmp_path / "ready")
    assert not re.search("QQQ|proj|pass1|only-in", str(refused.value))


def test_a_secret_in_the_weights_header_is_found(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / HEAD_FILE, metadata={"by": TOKEN})
    with pytest.raises(InputError, match=f"{HEAD_FILE}, line 1 holds what looks like a token"):
        check_public(tmp_path)


# --- the card ---------------------------------------------------------------------------------------------


def test_the_cards_metadata_is_the_hubs(tmp_path):
    """Read back by huggingface_hub, the model index as EvalResult; accuracy is a fraction there, as `evaluate`'s."""
    data = ModelCard.load(ready(run_with_record(tmp_path / "run", data_root="hub"), tmp_path) / CARD).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (BASE, "peft", "text-classification")
    assert (data.tags, data.license, data.datasets, data.model_name) == (
        ["lora", "copra"],
        None,
        [data.datasets[0]],
        "adapter",
    )
    found = {r.metric_type: (r.dataset_name, r.dataset_type, r.dataset_config, r.dataset_split, r.metric_value)
             for r in data.eval_results}  # fmt: skip
    # Its test set has no public labels: what is tested on is the published validation set.
    assert found == {name: ("sst2", data.datasets[0], "sst2", "validation", value)
                     for name, value in (("accuracy", 0.755), ("loss", 0.5), ("f1", 0.7))}  # fmt: skip
    assert data.datasets == ["nyu-mll/glue"]


def test_what_is_not_known_is_not_said(tmp_path):
    """Data from a folder have no name on the Hub; a bare adapter has neither method nor metrics; a value that is not
    finite is none."""
    local = ModelCard.load(ready(run_with_record(tmp_path / "run"), tmp_path) / CARD)
    assert local.data.datasets is None and {r.dataset_type for r in local.data.eval_results} == {"sst2"}
    config = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    bare = ModelCard(card(Adapter(REPO, BASE, config)))
    assert (bare.data.tags, bare.data.pipeline_tag, bare.data.eval_results) == (["lora"], "text-generation", None)
    assert "AutoModelForCausalLM" in bare.text and "not recorded" in bare.text and "## Results" not in bare.text
    record = Result("train", {}, {"test/sst2/loss": float("nan"), "test/sst2/accuracy": 50.0})
    shown = ModelCard(card(Adapter(REPO, BASE, config, RunConfig(), record)))
    assert [r.metric_value for r in shown.data.eval_results] == [0.5]


@pytest.mark.parametrize("method, said", [
    ("copra", "went from 0 to 1 (linear) over the first 0.75 of the steps"),
    ("coto", "went from 0.1 to 1 (linear) over the first 0.75 of the steps"),
    ("lora", "active with probability 1 in every step"),
])  # fmt: skip
def test_the_cards_text_says_how_it_was_made(tmp_path, method, said):
    text = ModelCard.load(ready(run_with_record(tmp_path / "run", method), tmp_path) / CARD).text
    rows = ("| seeds: start, data, masks | 3, 3, 3 |", "| steps | 8 |", "| test | sst2 | accuracy | 75.500 | 4 |")
    code = (f"copra merge {REPO} OTHER", f'AutoModel.from_pretrained("{BASE}"), "{REPO}")')
    for part in (said, *rows, *code, "2410.22911"):
        assert part in text, part


def test_the_licence_is_the_one_that_is_known(tmp_path):
    data = ModelCard.load(ready(run_with_record(tmp_path / "run"), tmp_path, licence="mit") / CARD).data
    assert data.license == "mit"


@pytest.mark.parametrize(
    "settings, datasets, pipeline",
    [
        ({"dataset_name": ["owner/words:2", "me.jsonl"], "packing": True}, ["owner/words"], "text-generation"),
        ({"dataset_name": ["my/own.jsonl"], "packing": True}, None, "text-generation"),
        ({"dataset_name": ["owner/pictures"], "shots": 4}, ["owner/pictures"], "zero-shot-image-classification"),
        ({"shots": 4, "data_root": "hub"}, None, "zero-shot-image-classification"),
    ],
)  # fmt: skip
def test_conversations_and_images(settings, datasets, pipeline):
    config = RunConfig.from_flat({"tasks": ["mine"], **settings})
    kind = "CAUSAL_LM" if pipeline == "text-generation" else "FEATURE_EXTRACTION"
    data = ModelCard(card(Adapter(REPO, BASE, {"r": 4, "lora_alpha": 8, "task_type": kind}, config))).data
    assert (data.datasets, data.pipeline_tag) == (datasets, pipeline)


def test_records_of_merging_and_pruning_stand_in_the_card(tmp_path):
    """Of a merged adapter too, which has no record of its own."""
    for i, record in enumerate([*made.lines(("lora", "copra"), ("sst2",)), *made.prunings(("copra",))]):
        config = record.config | {"model_name_or_path": str(tmp_path / "models" / "tiny")}
        write_result(tmp_path / "results" / f"{i}.json", dataclasses.replace(record, config=config))
    peft_adapter(tmp_path / "merged")
    text = ModelCard.load(ready(tmp_path / "merged", tmp_path, results=[tmp_path / "results"]) / CARD).text
    assert "## Merged and pruned" in text and "| tiny | sst2 | CopRA |" in text
    assert "every-other" in text and str(tmp_path) not in text
    for i, record in enumerate(made.runs(("lora",), ("sst2",))):
        write_result(tmp_path / "others" / f"{i}.json", record)
    (tmp_path / "again").mkdir()
    with pytest.raises(InputError, match="no record of merged or pruned adapters"):
        prepare(tmp_path / "merged", tmp_path / "again", REPO, results=[tmp_path / "others"])


# --- copra push -------------------------------------------------------------------------------------------


def test_a_dry_run_writes_all_and_asks_nobody(model_hub, tmp_path, capsys):
    run = run_with_record(tmp_path / "run")
    assert main(["push", str(run), REPO, "--dry_run", str(tmp_path / "look")]) == 0
    assert {CONFIG_FILE, WEIGHTS_FILE, CARD} <= {p.name for p in (tmp_path / "look").iterdir()} <= set(PUBLIC)
    assert "note: the tokenizer is left out" in capsys.readouterr().err
    assert not model_hub.seen


def test_pushed_is_what_a_dry_run_shows(model_hub, tmp_path, capsys):
    run = run_with_record(tmp_path / "run")
    assert main(["push", str(run), REPO, "--dry_run", str(tmp_path / "look")]) == 0
    assert main(["push", str(run), "adapter", "--private", "--revision", "main"]) == 0
    assert f"pushed to {model_hub.url}/{REPO}/commit/" in capsys.readouterr().out
    assert model_hub.files(REPO) == {p.name: p.read_bytes() for p in (tmp_path / "look").iterdir()}
    assert len(model_hub.repositories[REPO].messages) == 1 and model_hub.repositories[REPO].private


def test_the_bases_licence_is_asked_for(model_hub, tmp_path):
    model_hub.add(BASE, {CARD: b"---\nlicense: cc-by-4.0\n---\n"})
    assert main(["push", str(run_with_record(tmp_path / "run")), REPO]) == 0
    assert ModelCard(model_hub.files(REPO)[CARD].decode()).data.license == "cc-by-4.0"


def test_a_push_of_what_is_not_fit_leaves_nothing(model_hub, tmp_path, capsys):
    run = run_with_record(tmp_path / "run", template="a photo of {} by hf_" + "Q" * 34, shots=4)
    assert main(["push", str(run), REPO]) == 2
    assert "what looks like a token" in capsys.readouterr().err
    assert REPO not in model_hub.repositories


# --- --push_to_hub ----------------------------------------------------------------------------------------


@pytest.fixture
def base(model_hub, tiny_bert) -> str:
    """A tiny encoder on the hub."""
    model_hub.add("owner/tiny-bert", {p.name: p.read_bytes() for p in tiny_bert.iterdir() if p.is_file()})
    return "owner/tiny-bert"


def train(base: str, output: Path, *more: str) -> int:
    argv = ["--model_name_or_path", base, "--max_steps", "2", "--max_length", "16", "--max_train_samples", "8",
            "--max_eval_samples", "8", "--per_device_train_batch_size", "4", "--lora_r", "2", "--data_root", "sample",
            "--output_dir", str(output), "--push_to_hub", *more]  # fmt: skip
    return runpy.run_path(str(RECIPES / "train_mtl15.py"))["main"](argv)


def test_a_run_is_pushed_pulled_and_loaded_by_plain_peft(model_hub, base, tmp_path, capsys):
    """The weights byte for byte; the card's own code runs; by its id the adapter is as good as its record says."""
    assert train(base, tmp_path / "run", "--hub_model_id", REPO, "--tasks", "sst2") == 0
    assert f"pushed to {model_hub.url}/{REPO}/commit/" in capsys.readouterr().out
    pushed, own = model_hub.files(REPO), tmp_path / "run" / "sst2" / "adapter"
    assert pushed.keys() == {CONFIG_FILE, WEIGHTS_FILE, HEAD_FILE, CONFIG, RESULT, CARD, "tokenizer.json",
                             "tokenizer_config.json"}  # fmt: skip
    for name in (WEIGHTS_FILE, HEAD_FILE):
        assert pushed[name] == (own / name).read_bytes()
    assert "push_to_hub: false" in pushed[CONFIG].decode() and str(tmp_path).encode() not in b"".join(pushed.values())

    assert main(["pull", REPO, "--output", str(tmp_path / "pulled")]) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "pulled").iterdir()} == pushed
    assert yaml.safe_load((tmp_path / "pulled" / CONFIG).read_text())["model_name_or_path"] == base

    code = re.search(r"```python\n(.*?)```", pushed[CARD].decode(), re.S)[1]
    made: dict = {}
    exec(code, made)
    loaded = {name.replace(".default", ""): tensor for name, tensor in made["model"].state_dict().items()}
    for name, tensor in load_file(own / WEIGHTS_FILE).items():
        assert loaded[name].equal(tensor), name
    assert made["logits"].shape == (1, 2) and made["logits"].isfinite().all()

    capsys.readouterr()
    assert main(["evaluate", REPO, "--task", "sst2", "--data_root", "sample", "--max_eval_samples", "8"]) == 0
    accuracy = read_result(tmp_path / "run" / "sst2" / RESULT).metrics["test/sst2/accuracy"]
    assert f"test/sst2/accuracy: {accuracy:.3f}" in capsys.readouterr().out


def test_a_push_that_fails_keeps_the_run_and_says_how_to_push_it(model_hub, base, tmp_path, capsys):
    """Each of two tasks; the second is trained all the same. The command in the sentence then does it."""
    model_hub.fail("POST", f"{REPO}-sst2/commit/", 403, times=100)
    assert train(base, tmp_path / "run", "--hub_model_id", REPO, "--tasks", "sst2", "wic", "--hub_private_repo") == 2
    said = capsys.readouterr()
    assert said.err.count("error: ") == 1 and f"pushed to {model_hub.url}/{REPO}-wic/commit/" in said.out
    for task in ("sst2", "wic"):
        load_adapter_weights(tmp_path / "run" / task)
        read_result(tmp_path / "run" / task / RESULT)
    assert model_hub.files(f"{REPO}-sst2") == {}
    model_hub.failures.clear()
    command = re.search(r"copra (push .*)", said.err)[1].split()
    assert command[1:] == [str(tmp_path / "run" / "sst2"), f"{REPO}-sst2", "--private"]
    assert main(command) == 0 and WEIGHTS_FILE in model_hub.files(f"{REPO}-sst2")


def test_a_later_tasks_failure_hides_no_push_that_failed(model_hub, tmp_path):
    """Both are said: what stopped the run, and what is still to be pushed."""

    def results():
        yield Result("train", {"tasks": ["sst2"]}, {})
        raise InputError("the data of wic are broken")

    config = RunConfig().replace(tasks=["sst2", "wic"], output_dir=str(tmp_path / "run"), push_to_hub=True)
    with pytest.raises(InputError, match=r"^the data of wic are broken; .*run/sst2 is whole.*copra push .*run-sst2$"):
        list(push_each(config, results()))


def test_conversations_are_pushed_with_their_template(model_hub, tiny_llama, tmp_path):
    """The tokenizer goes along with the template that the run was trained on, and no path of the data does."""
    model_hub.add("owner/tiny-llama", {p.name: p.read_bytes() for p in tiny_llama.iterdir() if p.is_file()})
    data = write_conversations(tmp_path / "words.jsonl", 16)
    argv = ["--model_name_or_path", "owner/tiny-llama", "--dataset_name", str(data), "--max_steps", "1", "--dev_size",
            "4", "--max_length", "64", "--per_device_train_batch_size", "4", "--lora_r", "2", "--chat_template",
            "plain", "--output_dir", str(tmp_path / "talk"), "--push_to_hub"]  # fmt: skip
    assert runpy.run_path(str(RECIPES / "train_instruct.py"))["main"](argv) == 0
    pushed = model_hub.files("tester/talk")
    assert b"Assistant" in pushed["chat_template.jinja"]
    assert str(tmp_path).encode() not in b"".join(pushed.values()) and b"- words.jsonl" in pushed[CONFIG]
    shown = ModelCard(pushed[CARD].decode())
    assert (shown.data.pipeline_tag, shown.data.datasets) == ("text-generation", None)
    assert "words.jsonl: files of the author's own." in shown.text and "| train | 12 | 12 | 0 | 0 |" in shown.text


def test_what_cannot_be_pushed_is_refused_before_training(model_hub, base, tiny_bert, tmp_path, monkeypatch, capsys):
    def refusal(model, *more):
        assert train(model, tmp_path / "run", "--tasks", "sst2", *more) == 2
        return capsys.readouterr().err

    assert "copra push RUN OWNER/NAME --base_model ID" in refusal(str(tiny_bert))
    assert "can be no repository's name" in refusal(base, "--hub_model_id", "a/b/c")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    assert "hf auth login" in refusal(base)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="--hub_model_id was given, but nothing is pushed"):
        RunConfig().replace(hub_model_id="a/b")
