"""Runs on images: repeated and resumed byte for byte, whoever makes the views; every command works on them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from image_examples import CLASSES, COUNTS, RUN, TASK, image_config, write_images

from copra_llm.batches import BatchStream, eval_loader, train_loader
from copra_llm.build import build, training_labels
from copra_llm.cli import main
from copra_llm.config import ALL, COMMON, RunConfig, dump_yaml, parse_run_config, read_settings
from copra_llm.errors import InputError
from copra_llm.evaluate import evaluate
from copra_llm.images import Views, own_name, read_run_images, spread
from copra_llm.pictures import decode, eval_view
from copra_llm.results import read_result
from copra_llm.saved_runs import read_run
from copra_llm.settings import ImageSettings
from copra_llm.train import train_adapter

ROOT, RECIPE = Path(__file__).resolve().parents[1], "recipes/train_clip.py"


def script(file: str):
    """A script of the project as a module."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tiny_clip, image_data):
    return lambda **changes: image_config(tiny_clip, image_data, **changes)


@pytest.fixture(scope="module")
def runs(tiny_clip, image_data, tmp_path_factory) -> list[Path]:
    """Two finished runs with two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train_adapter(image_config(tiny_clip, image_data, seed=seed), [TASK], folder / f"seed-{seed}")
    return [folder / f"seed-{seed}" for seed in (0, 1)]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


# --- the same bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"dataloader_num_workers": 2}, {"image_cache_bytes": 0}, {"image_cache_bytes": 20_000}],
    ids=["processes", "nothing kept", "some kept"],
)
def test_who_makes_the_views_does_not_matter(runs, config, tmp_path, changes):
    train_adapter(config(**changes), [TASK], tmp_path / "run")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(runs[0]) != adapter_bytes(runs[1])
    first, again = (read_result(folder / "result.json") for folder in (runs[0], tmp_path / "run"))
    assert first.metrics == again.metrics and first.data["log"] == again.data["log"]


@pytest.mark.parametrize("changes", [{}, {"dataloader_num_workers": 2}, {"gradient_checkpointing": True}])
def test_resumed_is_uninterrupted(config, tmp_path, changes):
    """From step 3 of 6, bit for bit; with evaluations in between, whose kept features must not matter."""
    whole = config(eval_steps=2, save_steps=3, **changes)
    train_adapter(whole, [TASK], tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    train_adapter(whole.replace(resume_from_checkpoint="latest"), [TASK], tmp_path / "again")
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "whole")
    logs = [read_result(tmp_path / name / "result.json").data["dev"] for name in ("whole", "again")]
    assert logs[0] == logs[1] and len({entry["dev/cifar10/loss"] for entry in logs[0]}) == 2


def test_checkpointed_activations_change_nothing(runs, config, tmp_path):
    train_adapter(config(gradient_checkpointing=True), [TASK], tmp_path / "run")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(runs[0])


def test_accumulated_micro_batches_share_one_mask(config, tmp_path):
    """One step of two micro-batches of 3 examples moves the adapter as one of 6 does: the views follow the place."""
    result = train_adapter(config(gradient_accumulation_steps=2), [TASK], tmp_path / "run")
    assert result.steps == 6 and result.examples == 36


def test_half_precision(config, tmp_path, runs):
    """Under bfloat16 features that are kept are those of that precision; the run ends near the full one's."""
    result = train_adapter(config(bf16=True), [TASK], tmp_path / "run")
    full = read_result(runs[0] / "result.json")
    assert result.metrics["test/cifar10/loss"] != full.metrics["test/cifar10/loss"]
    # Eight bits of mantissa through seven layers and six steps; another adapter is several tenths away.
    assert abs(result.metrics["test/cifar10/loss"] - full.metrics["test/cifar10/loss"]) < 0.1


def test_colours_are_learned(config, tmp_path):
    """Four classes that differ in colour, sixteen images: far above chance, and above the random model before."""
    learned = config(method="lora", max_steps=60, per_device_train_batch_size=8, lora_dropout=0.0, learning_rate=5e-3)
    result = train_adapter(learned, [TASK], tmp_path / "run")
    assert result.metrics["test/cifar10/accuracy"] >= 60.0


# --- views ------------------------------------------------------------------------------------------------


def test_a_training_view_is_a_function_of_its_place(config):
    """A stream that starts late, or another process, makes the same pixels; another seed and another place do not."""
    bench = build(config(), [TASK], splits=("train",))
    splits = list(bench.splits["train"].values())

    def batches(start: int, seed: int = 0) -> list[torch.Tensor]:
        stream = BatchStream(splits, 3, seed, start, 8)
        return [batch["pixels"] for batch in train_loader(bench.classifier, splits, stream)]

    whole = batches(0)
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], batches(5), strict=True))
    assert not torch.equal(whole[0], batches(0, seed=1)[0])
    example = splits[0].encoded[0]
    views = [splits[0].views(example, place) for place in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    assert len({view.tobytes() for view in views}) == 4
    assert np.array_equal(views[0], splits[0].views(example, (0, 0, 0)))


def test_evaluation_keeps_its_views(config):
    """Of training images too it sees the middle, as of all others, which are read once."""
    splits = {split: tasks[TASK] for split, tasks in build(config(), [TASK], splits=("train", "test")).splits.items()}
    for split in splits.values():
        for example in split.encoded[:3]:
            expected = eval_view(decode(example.source), split.views.size)
            assert np.array_equal(split.views(example, None), expected)
    first = splits["test"].encoded[0]
    assert splits["test"].views(first, None) is splits["test"].views(first, None)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_read_the_stream_in_turns(config, processes):
    """Whichever of them reads a micro-batch, its number and its places are the stream's."""
    from accelerate.data_loader import BatchSamplerShard

    splits = list(build(config(), [TASK], splits=("train",)).splits["train"].values())
    sampler = train_loader(None, splits, BatchStream(splits, 3, 0, 6, 6 + 2 * processes)).batch_sampler
    shards = [list(BatchSamplerShard(sampler, processes, rank)) for rank in range(processes)]
    assert [batch for turn in zip(*shards, strict=True) for batch in turn] == list(sampler)
    assert [item[:2] for item in shards[1][0]] == [(7, 0), (7, 1), (7, 2)]


def test_several_sets_share_one_adapter(config, tmp_path):
    """--joint: micro-batches are of one set after the other, each with its own prompts."""
    write_images(tmp_path, ("pie", "soup"), COUNTS, "food-101", "split_zhou_Food101.json")
    shutil.copytree(Path(config().data.data_root) / TASK, tmp_path / TASK)
    both = config(data_root=str(tmp_path), tasks=[TASK, "food101"], joint=True, max_steps=4)
    result = train_adapter(both, [TASK, "food101"], tmp_path / "run")
    assert {"test/cifar10/accuracy", "test/food101/accuracy"} <= result.metrics.keys()
    alone = ["evaluate", str(tmp_path / "run"), "--task", "food101", "--output", str(tmp_path / "one.json")]
    assert main(alone) == 0
    found = read_result(tmp_path / "one.json").metrics["test/food101/loss"]
    assert found == pytest.approx(result.metrics["test/food101/loss"], rel=1e-6)


def test_evaluation_sees_the_middle(config):
    bench = build(config(), [TASK], splits=("test",))
    split = bench.splits["test"][TASK]
    batch = next(iter(eval_loader(bench.classifier, split, 4)))
    expected = [eval_view(decode(split.encoded[i].source), 16) for i in batch["index"]]
    assert np.array_equal(batch["pixels"].numpy(), np.stack(expected))


def test_an_image_is_decoded_once(config, monkeypatch):
    from copra_llm import pictures

    counted = []
    monkeypatch.setattr(pictures, "decode", lambda source: counted.append(source) or decode(source))
    bench = build(config(), [TASK], splits=("train",))
    split = bench.splits["train"][TASK]
    for _ in range(3):
        for i in range(len(split)):
            split.view(i, (0, i, 0))
    assert len(counted) == len(set(counted)) == len(split)


def test_nothing_is_kept_beyond_the_limit(config):
    split = build(config(image_cache_bytes=3000), [TASK], splits=("train",)).splits["train"][TASK]
    assert isinstance(split.views, Views)
    for i in range(len(split)):
        split.view(i)
    assert 0 < split.views.cache.kept_bytes <= 3000


# --- which images -----------------------------------------------------------------------------------------


def test_shots_follow_their_seed(config):
    """The data seed unless another is given; dev is a few, test is all."""
    splits = ("train", "dev", "test")

    def drawn(**changes) -> dict:
        (run,) = read_run_images(config(**changes), [TASK], splits)
        return run.splits

    first = drawn()
    assert [len(first[s]) for s in splits] == [4 * 4, 4 * 3, 4 * 5]
    assert drawn(seed=1)["train"] != first["train"] == drawn(seed=1, shot_seed=0)["train"]
    assert drawn(seed=1)["dev"] == first["dev"], "runs are compared on the same"
    assert drawn(seed=1, data_seed=0)["train"] == first["train"] == drawn(method="lora", mask_seed=9)["train"]
    assert len(drawn(shots=None)["train"]) == 4 * 6
    limited = drawn(max_eval_samples=8)["test"]
    assert sorted(example.label for example in limited) == [0, 0, 1, 1, 2, 2, 3, 3], "of every class"


def test_spread():
    assert spread(list(range(10)), 4) == [0, 2, 5, 7] and spread([1, 2], 5) == [1, 2] == spread([1, 2], None)


def test_clients_share_the_training_images(config):
    splits = [build(config(num_clients=2, client=c), [TASK], splits=("train",)).splits["train"][TASK] for c in (0, 1)]
    for client, split in enumerate(splits):
        assert training_labels(config(num_clients=2, client=client), TASK) == (split.labels, 4)
    sources = [{example.source for example in split.encoded} for split in splits]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 16


def test_a_folder_of_ones_own(tiny_clip, tmp_path):
    """Class folders, under the folder's name or another one that is no set's."""
    write_images(tmp_path / "data")
    (tmp_path / "data" / TASK / "split.json").unlink()
    (tmp_path / "data" / TASK / "images").rename(tmp_path / "beasts")
    own = image_config(tiny_clip, tmp_path / "data", dataset_name=[str(tmp_path / "beasts")], shots=2)
    assert own_name(own).data.tasks == ["beasts"] and own_name(own.replace(tasks=["mine"])).data.tasks == ["mine"]
    result = train_adapter(own_name(own), ["beasts"], tmp_path / "run")
    assert "test/beasts/accuracy" in result.metrics
    assert main(["evaluate", str(tmp_path / "run"), "--task", "beasts"]) == 0
    again = ["evaluate", str(tmp_path / "run"), "--task", "beasts", "--dataset_name", str(tmp_path / "beasts")]
    assert main([*again, "--output", str(tmp_path / "again.json")]) == 0
    metrics = read_result(tmp_path / "again.json").metrics
    assert metrics["test/beasts/loss"] == pytest.approx(result.metrics["test/beasts/loss"], rel=1e-6)
    with pytest.raises(InputError, match="one data set and one name"):
        own_name(own.replace(tasks=["mine", "yours"]))


# --- commands ---------------------------------------------------------------------------------------------


def test_commands_work_on_image_runs(runs, tmp_path, capsys):
    a, b = map(str, runs)
    assert main(["evaluate", a, "--task", TASK, "--output", str(tmp_path / "one.json")]) == 0
    record = read_result(runs[0] / "result.json")
    found = read_result(tmp_path / "one.json")
    assert found.metrics["test/cifar10/accuracy"] == record.metrics["test/cifar10/accuracy"]
    assert main(["merge", a, b, "--method", "fusion", "--output", str(tmp_path / "merged")]) == 0
    assert main(["interpolate", a, b, "--task", TASK, "--points", "3", "--output", str(tmp_path / "line")]) == 0
    assert main(["prune", a, "--task", TASK, "--keep", "all", "low", "vision_model.encoder.layers", "q_proj",
                 "--output", str(tmp_path / "pruned.json")]) == 0  # fmt: skip
    rows = {row["name"]: row for row in read_result(tmp_path / "pruned.json").data["rows"]}
    assert rows["all"]["loss"] == pytest.approx(record.metrics["test/cifar10/loss"], rel=1e-6)
    assert len({row["loss"] for row in rows.values()}) == 4
    assert main(["shapley", a, "--task", TASK, "--split", "test", "--budget", "200",
                 "--output", str(tmp_path / "shapley.json")]) == 0  # fmt: skip
    values = read_result(tmp_path / "shapley.json").data
    assert len(values["players"]) == 7 and values["evaluations"] == 2**7
    assert sum(values["values"]) == pytest.approx(values["v_full"] - values["v_empty"])
    assert "nats" in capsys.readouterr().out


def test_a_sets_name_is_known(runs, capsys):
    assert main(["evaluate", str(runs[0]), "--task", "oxford_flower"]) == 2
    assert 'did you mean "oxford_flowers"' in capsys.readouterr().err


def test_baselines_see_the_frozen_model(tiny_clip, image_data, tmp_path, capsys):
    """Zero-shot is what an adapter of zeros gives; what has a record is not done again."""
    flags = ["--tasks", TASK, "--shots", "4", "--model_name_or_path", str(tiny_clip), "--data_root", str(image_data),
             "--output_dir", str(tmp_path)]  # fmt: skip
    script("eval/clip/baselines.py").main(flags)
    records = {way: read_result(tmp_path / TASK / f"{way}-4-seed0.json") for way in ("zero-shot", "linear-probe")}
    bench = build(image_config(tiny_clip, image_data), [TASK], splits=("test",))
    untrained = evaluate(Accelerator(), bench.classifier, bench.splits["test"][TASK], 128)
    assert records["zero-shot"].metrics["test/cifar10/loss"] == pytest.approx(untrained.loss, rel=1e-6)
    probe = records["linear-probe"].metrics["test/cifar10/accuracy"]
    assert probe >= 60.0, "colours can be told apart in the features"
    capsys.readouterr()
    script("eval/clip/baselines.py").main(flags)
    assert capsys.readouterr().out == ""


# --- settings ---------------------------------------------------------------------------------------------


def test_the_recipes_protocol_is_clip_loras():
    made = script(RECIPE)
    config = made.resolved(parse_run_config(["--shots", "4"], None, (*COMMON, ImageSettings), made.DEFAULTS))
    train, lora = config.train, config.lora
    assert (train.max_steps, train.per_device_train_batch_size, train.weight_decay) == (2000, 32, 1e-2)
    assert (train.learning_rate, train.min_lr, train.max_grad_norm) == (5e-4, 1e-6, 0.0)
    assert lora.lora_r == 2 and lora.lora_dropout == 0.25 and lora.scaling == pytest.approx(2**-0.5)
    given = made.resolved(parse_run_config(["--max_steps", "7"], None, (*COMMON, ImageSettings), made.DEFAULTS))
    assert given.train.max_steps == 7 and given.image.shots == 16
    assert RunConfig.from_flat(given.flat()) == given


def test_the_recipe_runs(tiny_clip, image_data, tmp_path):
    flags = [f"--{key}={value}" for key, value in RUN.items() if key not in ("tasks", "checkpoint_at")]
    code = script(RECIPE).main([*flags, "--tasks", TASK, "--model_name_or_path", str(tiny_clip), "--data_root",
                          str(image_data), "--output_dir", str(tmp_path)])  # fmt: skip
    assert code in (0, None) and json.loads((tmp_path / TASK / "result.json").read_text())["steps"] == 6
    assert read_run(tmp_path / TASK).config.image.shots == 4


def test_cosine_to_a_floor(config, tmp_path):
    """eta_min + (lr - eta_min) (1 + cos(pi t / T)) / 2, torch's CosineAnnealingLR, as CLIP-LoRA uses it."""
    floored = config(lr_scheduler_type="cosine_with_min_lr", min_lr=1e-3, max_steps=5, method="lora")
    logged = [entry["learning_rate"] for entry in train_adapter(floored, [TASK], tmp_path / "run").data["log"]]
    expected = [1e-3 + (0.02 - 1e-3) * (1 + np.cos(np.pi * t / 5)) / 2 for t in range(1, 6)]
    assert logged == pytest.approx(expected, rel=1e-9)


def test_the_shared_setting_goes_to_its_owner(tmp_path):
    """`dataset_name` is in two groups; what else is given says which run it is."""
    image = RunConfig().replace(dataset_name=["folder"], shots=2)
    assert image.instruct is None and image.image.dataset_name == ["folder"]
    talk = RunConfig().replace(dataset_name=["file.jsonl"])
    assert talk.image is None and talk.instruct.dataset_name == ["file.jsonl"]
    for config in (image, talk):
        (tmp_path / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
        assert RunConfig.from_flat(read_settings(tmp_path / "config.yaml")) == config
    names = [name for group in ALL for name in group.__dataclass_fields__]
    assert {name for name in names if names.count(name) > 1} == {"dataset_name"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shots": 0}, "--shots is 0"),
        ({"shots": 7}, 'class "cat" has 6 training images, but 7 shots'),
        ({"encoder": "visio"}, 'did you mean "vision"'),
        ({"template": "a photo"}, "must have one {}"),
        ({"shot_seed": -1}, "--shot_seed is -1"),
        ({"dataloader_num_workers": -1}, "must not be negative"),
        ({"min_lr": 1e-6}, "give --min_lr 0, or cosine_with_min_lr"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "min_lr": 1.0}, r"must lie in \[0, --learning_rate\]"),
        ({"data_root": "/nowhere"}, "/nowhere"),
        ({"lora_target_modules": ["fc3"]}, "no module of the model matches"),
        ({"lora_layers_to_transform": [9]}, "names block 9"),
    ],
)
def test_bad_settings_are_refused(config, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train_adapter(config(**changes), [TASK], tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_broken_image_stops_the_run_with_its_name(tiny_clip, tmp_path, capsys):
    root = write_images(tmp_path / "data")
    broken = root / TASK / "images" / CLASSES[1] / "test_0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    for workers in (0, 2):
        made = build(image_config(tiny_clip, root, dataloader_num_workers=workers), [TASK], splits=("test",))
        with pytest.raises(InputError, match="test_0.png"):
            list(eval_loader(made.classifier, made.splits["test"][TASK], 4))
