"""Are our scores lm-evaluation-harness' own, on the same items? Needs the extra lm-eval."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from examples import REAL_DATA

from copra_llm.choice_model import ChoiceModel, encode_pair
from copra_llm.cli import main
from copra_llm.config import RunConfig
from copra_llm.models import add_adapter, load_base
from copra_llm.tasks.choices import choice_task_names, get_choice_task, load_choices

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
pytestmark = pytest.mark.slow


@pytest.fixture
def root() -> Path:
    folder = REAL_DATA / "instruct" / "commonsense"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; COPRA_TEST_DATA names the folder above instruct")
    return folder


def adapted(base: str):
    """A base model with an adapter whose B is not zero."""
    config = RunConfig().replace(model_name_or_path=base, lora_target_modules=["all-linear"])
    loaded = load_base(config.model)
    model = add_adapter(loaded, config.lora, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.arange(p.numel()).reshape(p.shape).remainder(7).float() * 0.002)
    return loaded, model.eval()


def our_scores(model: ChoiceModel, task, examples) -> list[float]:
    found = []
    with torch.inference_mode():
        for i in range(0, len(examples), 8):
            encoded = [model.encode(task, example) for example in examples[i : i + 8]]
            rows = model(model.collate(task, encoded, [0] * len(encoded)), scores=True)
            found += [float(score) for row in rows for score in row if score > -torch.inf]
    return found


def their_scores(model, tokenizer, pairs, max_length: int) -> list[float]:
    """Log-likelihoods of lm_eval's own Hugging Face model on contexts and continuations."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=max_length)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]


@pytest.mark.parametrize("name", choice_task_names())
@pytest.mark.parametrize("base, max_length, items", [("tiny", 500, 30), ("tiny", 40, 30), ("smollm2", 512, 3)])
def test_scores_are_theirs(root, request, base, max_length, items, name):
    """On published items, to 1e-4 nats (sums of float32, so relative beyond 10); 40 tokens cut most contexts."""
    loaded, peft = adapted(base if base == "smollm2" else str(request.getfixturevalue("tiny_llama")))
    task = get_choice_task(name)
    examples = load_choices(task, "test", root, items)
    # A continuation beyond the limit is refused here, and by an assertion there.
    examples = [e for e in examples if all(len(encode_pair(loaded.tokenizer, *p)[1]) <= max_length for p in e.pairs)]
    pairs = [pair for example in examples for pair in example.pairs]
    assert len(pairs) >= 6
    found = our_scores(ChoiceModel(loaded, peft, max_length), task, examples)
    theirs = their_scores(peft, loaded.tokenizer, pairs, max_length)
    np.testing.assert_allclose(found, theirs, atol=1e-4, rtol=1e-6)


# --- the hand-over ----------------------------------------------------------------------------------------


def test_its_own_command_gives_our_figures(root, tiny_llama, tmp_path, capsys):
    """`lm_eval --model hf` in a process of its own, on base and adapter and on the folded model, against ours."""
    _, peft = adapted(str(tiny_llama))
    peft.save_pretrained(tmp_path / "adapter")
    assert main(["fold", str(tmp_path / "adapter"), "--output", str(tmp_path / "folded")]) == 0
    names = ["arc_easy", "boolq_closed", "winogrande"]
    limit = ["--data_root", str(root), "--max_eval_samples", "25"]
    assert main(["data", "lm-eval", *names, *limit, "--output", str(tmp_path / "tasks")]) == 0
    said = capsys.readouterr().out
    assert f"--include_path {tmp_path / 'tasks'} --tasks copra_arc_easy,copra_boolq_closed,copra_winogrande" in said
    ours = {}
    for name in names:
        record = tmp_path / f"{name}.json"
        command = ["evaluate", str(tmp_path / "adapter"), "--task", name, "--max_length", "512", *limit]
        assert main([*command, "--output", str(record)]) == 0
        ours |= json.loads(record.read_text(encoding="utf-8"))["metrics"]
    for model in (f"pretrained={tiny_llama},peft={tmp_path / 'adapter'}", f"pretrained={tmp_path / 'folded'}"):
        theirs = lm_eval_results(model, tmp_path, names)
        for name in names:
            assert 100 * theirs[f"copra_{name}"]["acc,none"] == pytest.approx(ours[f"test/{name}/accuracy"])
            if name != "winogrande":
                assert 100 * theirs[f"copra_{name}"]["acc_norm,none"] == pytest.approx(ours[f"test/{name}/acc_norm"])


def lm_eval_results(model: str, folder: Path, names: list[str]) -> dict:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    tasks = ",".join(f"copra_{name}" for name in names)
    words = ["--model", "hf", "--model_args", f"{model},dtype=float32", "--device", "cpu", "--batch_size", "4",
             "--include_path", str(folder / "tasks"), "--tasks", tasks, "--output_path", str(out)]  # fmt: skip
    command = [sys.executable, "-m", "lm_eval", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = out.rglob("results_*.json")
    return json.loads(results.read_text(encoding="utf-8"))["results"]
