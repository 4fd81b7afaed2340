"""LoRA+ rates, NEFTune noise, and the best adapter: what they do, and that the loop keeps its promises."""

from __future__ import annotations

import pytest
import torch

from copra_llm import train
from copra_llm.adapters import load_adapter_weights
from copra_llm.best import BestAdapter
from copra_llm.build import build
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.neftune import noisy_embeddings
from copra_llm.optimizer import make_optimizer
from copra_llm.progress import Progress
from copra_llm.results import read_result
from copra_llm.schedule import METHODS
from copra_llm.train import train_adapter

BASE = {"tasks": ["sst2"], "data_root": "sample", "max_length": 24, "max_train_samples": 16, "max_eval_samples": 4,
        "per_device_train_batch_size": 4, "learning_rate": 0.01, "max_steps": 4, "checkpoint_at": []}  # fmt: skip


@pytest.fixture
def config(tiny_llama):
    return RunConfig().replace(**BASE, model_name_or_path=str(tiny_llama))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_adapter_weights(folder).state_dict()


def test_the_factors_b_learn_faster(config):
    """Every trained parameter is in one group, with its own rate; without the setting all learn alike."""
    bench = build(config, ["sst2"], splits=("train",))
    names = {id(p): name for name, p in bench.classifier.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(bench.classifier, config.replace(loraplus_lr_ratio=16.0, weight_decay=0.1).train)
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(names.values())
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {0.16}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {0.01}
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups if group["params"])
    (alone,) = make_optimizer(bench.classifier, config.train).param_groups
    assert alone["lr"] == 0.01 and len(alone["params"]) == len(names)


def test_a_run_with_lora_plus_takes_larger_steps_in_b(config, tmp_path):
    """Adam's first step is the rate times the gradient's sign; A has no gradient yet, since B is 0."""
    for name, ratio in (("plain", None), ("plus", 8.0)):
        train_adapter(config.replace(max_steps=1, loraplus_lr_ratio=ratio, method="lora"), ["sst2"], tmp_path / name)
    plain, plus = (weights(tmp_path / name) for name in ("plain", "plus"))
    moved = [key for key in plain if "lora_B" in key and plain[key].abs().max() > 0]
    assert moved
    for key in moved:
        torch.testing.assert_close(plus[key], 8 * plain[key], rtol=1e-3, atol=1e-6)


def test_noise_is_a_function_of_seed_and_step(config, tmp_path):
    """The same run twice gives the same bytes, also resumed; without noise, or with another seed, others."""
    noisy = config.replace(neftune_noise_alpha=5.0, checkpoint_at=[0.5])
    runs = {"once": noisy, "again": noisy, "without": config, "other": noisy.replace(data_seed=7)}
    for name, run in runs.items():
        train_adapter(run, ["sst2"], tmp_path / name)
    half = noisy.replace(resume_from_checkpoint=str(tmp_path / "once" / "checkpoint-2"))
    train_adapter(half, ["sst2"], tmp_path / "resumed")
    file = "adapter/adapter_model.safetensors"
    read = {p.name: (p / file).read_bytes() for p in tmp_path.iterdir()}
    assert read["once"] == read["again"] == read["resumed"]
    assert len({read["once"], read["without"], read["other"]}) == 3


def test_noise_is_bounded_and_gone_afterwards(config):
    model = build(config, ["sst2"], splits=("train",)).base.model
    embeddings, ids = model.get_input_embeddings(), torch.arange(6)[None]
    clean = embeddings(ids)
    with noisy_embeddings(model, 3.0):
        noise = embeddings.train()(ids) - clean
        assert 0 < noise.abs().max() <= 3.0 / (clean.shape[1] * clean.shape[2]) ** 0.5 + 1e-6
        assert torch.equal(embeddings.eval()(ids), clean), "not in evaluation"
    assert torch.equal(embeddings.train()(ids), clean) and not embeddings._forward_hooks


@pytest.mark.parametrize("setting", ["loraplus_lr_ratio", "neftune_noise_alpha"])
def test_what_must_be_positive_is(config, setting):
    with pytest.raises(InputError, match=f"--{setting} is -1"):
        config.replace(**{setting: -1.0})


# --- the best adapter -------------------------------------------------------------------------------------


def losses_of(folder) -> dict[int, float]:
    return {entry["step"]: entry["dev/sst2/loss"] for entry in read_result(folder / "result.json").data["dev"]}


@pytest.fixture(scope="module")
def overfitting(tiny_llama, tmp_path_factory):
    """A run whose dev loss falls and rises again: a large rate on four examples."""
    changes = {"max_train_samples": 4, "max_eval_samples": 16, "learning_rate": 0.05, "max_steps": 24, "eval_steps": 2}
    config = RunConfig().replace(**BASE | {"model_name_or_path": str(tiny_llama), "lr_scheduler_type": "constant"})
    config = config.replace(**changes, save_steps=2)
    folder = tmp_path_factory.mktemp("best")
    for method in ("lora", "copra"):
        train_adapter(config.replace(method=method), ["sst2"], folder / f"{method}-last")
        best = config.replace(method=method, load_best_model_at_end=True)
        train_adapter(best, ["sst2"], folder / f"{method}-best")
    return config, folder


@pytest.mark.parametrize("method, first", [("lora", 2), ("copra", 18)])
def test_a_run_ends_with_its_best_adapter(overfitting, method, first):
    """The checkpoint of the least dev loss, byte for byte; of CopRA among those after the ramp alone."""
    _, folder = overfitting
    losses = losses_of(folder / f"{method}-best")
    best = min((loss, step) for step, loss in losses.items() if step >= first)[1]
    assert max(losses) == 24, "the last step is evaluated too"
    if method == "lora":
        assert best != 24, "or nothing is shown"
    own = weights(folder / f"{method}-best")
    kept = weights(folder / f"{method}-last" / f"checkpoint-{best}")
    assert own.keys() == kept.keys() and all(torch.equal(own[key], kept[key]) for key in own)
    metrics = read_result(folder / f"{method}-best" / "result.json").metrics
    assert metrics["dev/sst2/loss"] == pytest.approx(losses[best], rel=1e-6)
    assert not (folder / f"{method}-best" / "best").exists()


def test_evaluations_before_the_ramp_has_ended_do_not_count(tmp_path):
    """A small loss at step 2 of a CopRA run is not its best."""
    progress = Progress(step=24, dev=[{"step": s, "dev/a/loss": v} for s, v in ((2, 0.1), (18, 0.9), (20, 0.7))])
    settings = RunConfig().replace(load_best_model_at_end=True, eval_steps=2).train
    best = BestAdapter(None, tmp_path, settings, lambda step: METHODS["copra"].settled(step / 24), Progress())
    best.progress = progress
    assert best.step == 20
    best.progress.dev.append({"step": 22, "dev/a/loss": float("nan")})
    assert best.step == 20


@pytest.mark.parametrize("patience", [1, 3])
def test_a_run_stops_once_it_gets_no_better(overfitting, tmp_path, patience):
    config, folder = overfitting
    run = config.replace(method="lora", early_stopping_patience=patience)
    result = train_adapter(run, ["sst2"], tmp_path / "run")
    steps, losses = zip(*sorted(losses_of(folder / "lora-best").items()), strict=True)
    best = next(i for i in range(len(losses)) if min(losses[: i + 1 + patience]) == losses[i] == min(losses[: i + 1]))
    assert result.steps == steps[best + patience] < 24
    assert result.metrics["dev/sst2/loss"] == pytest.approx(losses[best], rel=1e-6)


def test_a_stopped_run_finds_the_same_best_adapter(overfitting, tmp_path):
    """Resumed in its folder, from before or after the best step."""
    config, folder = overfitting
    config = config.replace(method="lora", load_best_model_at_end=True)
    wanted = weights(folder / "lora-best")
    for step in (2, 20):
        run = tmp_path / str(step)
        with pytest.MonkeyPatch.context() as patch:
            save, calls = train.save_checkpoint, []

            def stop(*args, save=save, calls=calls, step=step):
                save(*args)
                calls.append(args[-1].step)
                if calls[-1] == step:
                    raise KeyboardInterrupt

            patch.setattr(train, "save_checkpoint", stop)
            with pytest.raises(KeyboardInterrupt):
                train_adapter(config, ["sst2"], run)
        train_adapter(config.replace(resume_from_checkpoint="latest"), ["sst2"], run)
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in weights(run).items())


def test_a_run_stopped_after_its_last_step_keeps_its_best_adapter(overfitting, tmp_path, monkeypatch):
    """Until the run's own adapter is written the best one stays where it was found, and resuming finds it again."""
    config, folder = overfitting
    config = config.replace(method="lora", load_best_model_at_end=True)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_adapter", stop)
        with pytest.raises(KeyboardInterrupt):
            train_adapter(config, ["sst2"], tmp_path)
    train_adapter(config.replace(resume_from_checkpoint="latest"), ["sst2"], tmp_path)
    wanted = weights(folder / "lora-best")
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in weights(tmp_path).items())
    assert not (tmp_path / "best").exists()


def test_the_best_needs_evaluations(config):
    with pytest.raises(InputError, match="give --eval_steps"):
        config.replace(load_best_model_at_end=True)
    with pytest.raises(InputError, match="--early_stopping_patience is 0"):
        config.replace(early_stopping_patience=0, eval_steps=1)
