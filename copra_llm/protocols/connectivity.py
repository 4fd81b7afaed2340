"""Do two runs that differ only in their seed stay good when they are merged?

For every model, task and method of a plan:

1. tune on dev: each learning rate at the smaller number of steps, then the better rate at the larger one;
2. train every seed at the settings that were best on dev (accuracy, then loss);
3. merge all pairs of seeds, by fusion and by mixture, and evaluate on test along the line.

Every run leaves one result record; what has a record is not run again, so the protocol can be stopped and
started, and several processes can share the work by model and task.

Source: CopRA (arXiv 2410.22911), section 3.1 and figure 3.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from copra_llm.adapters import load_adapter_weights
from copra_llm.build import build
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.interpolate import curve_record, interpolate
from copra_llm.results import Result, read_result, write_result
from copra_llm.train import train_adapter


@dataclass(frozen=True)
class Plan:
    """What is compared on one model."""

    tasks: list[str]
    methods: list[str]
    seeds: list[int]
    learning_rate: list[float]
    """Candidates, tuned on dev."""
    max_steps: list[int]
    """Candidates in increasing order, tuned on dev."""
    points: dict[str, int]
    """Points of the curve for each merge method; 3 are the ends and the middle."""
    settings: dict[str, Any]
    """Everything else, by the flags' names."""


def read_plan(path: Path) -> dict[str, Plan]:
    """`{model: Plan}` from YAML; `all` holds what the models share.

    Raises:
        InputError: if the file or an entry is not of that form.
    """
    import yaml

    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    shared = values.pop("all", {})
    plans = {}
    for model, own in values.items():
        entry = shared | own
        entry["settings"] = shared.get("settings", {}) | own.get("settings", {})
        missing = sorted(set(Plan.__dataclass_fields__) - set(entry))
        unknown = sorted(set(entry) - set(Plan.__dataclass_fields__))
        if missing or unknown:
            what = f"lacks {missing[0]}" if missing else f"has the unknown entry {unknown[0]}"
            raise InputError(f"{path}: the plan of {model} {what}; it needs {', '.join(Plan.__dataclass_fields__)}")
        plans[model] = Plan(**entry)
    return plans


def run_plan(model: str, plan: Plan, results: Path, work: Path, data_root: str | None, say=print) -> None:
    """Do what is missing of a plan.

    Args:
        model: `--model_name_or_path`.
        plan: from `read_plan`.
        results: records go to `results/<model>/<task>/<method>/*.json`.
        work: adapters and checkpoints go here, under the same names.
        data_root: of MTL15.
        say: reports progress.
    """
    for task, method in itertools.product(plan.tasks, plan.methods):
        records, scratch = results / model / task / method, work / model / task / method
        base = RunConfig().replace(
            **plan.settings, model_name_or_path=model, tasks=[task], method=method, data_root=data_root
        )

        def train(seed: int, rate: float, steps: int, base=base, task=task, records=records, scratch=scratch) -> Result:
            name = f"lr{rate:g}-steps{steps}-seed{seed}"
            record = records / f"{name}.json"
            if not (record.is_file() and (scratch / name / "adapter").is_dir()):
                config = base.replace(
                    seed=seed, learning_rate=rate, max_steps=steps, output_dir=str(scratch / name),
                    resume_from_checkpoint="latest",
                )  # fmt: skip
                result = train_adapter(config, [task], scratch / name)
                write_result(record, _portable(result))
                say(f"{record}: dev {result.metrics[f'dev/{task}/accuracy']:.1f} in {result.seconds:.0f} s")
            return read_result(record)

        rate, steps = tune(lambda r, s: dev_score(train(plan.seeds[0], r, s), task), plan)  # noqa: B023
        for seed in plan.seeds:
            train(seed, rate, steps)
        folders = {seed: scratch / f"lr{rate:g}-steps{steps}-seed{seed}" for seed in plan.seeds}
        for (a, b), merge_method in itertools.product(itertools.combinations(plan.seeds, 2), plan.points):
            record = records / f"{merge_method}-lr{rate:g}-steps{steps}-seeds{a}-{b}.json"
            if not record.is_file():
                curve = pair_curve(
                    [folders[a], folders[b]],
                    base.replace(learning_rate=rate, max_steps=steps),
                    task,
                    merge_method,
                    plan.points[merge_method],
                    {"seeds": [a, b]},
                )
                write_result(record, _portable(curve))
                say(f"{record}: drop in the middle {curve.metrics[f'test/{task}/middle_drop']:.1f}")


def tune(score, plan: Plan) -> tuple[float, int]:
    """Learning rate and steps with the highest `score(rate, steps)`: rates first, at the fewest steps."""
    few = plan.max_steps[0]
    scores = {(rate, few): score(rate, few) for rate in plan.learning_rate}
    rate = max(scores, key=scores.get)[0]
    for steps in plan.max_steps[1:]:
        scores[rate, steps] = score(rate, steps)
    return max(scores, key=scores.get)


def dev_score(result: Result, task: str) -> tuple[float, float]:
    """Dev accuracy, then smaller dev loss."""
    loss = result.metrics[f"dev/{task}/loss"]
    return result.metrics[f"dev/{task}/accuracy"], -loss if loss is not None else -np.inf


def pair_curve(folders: list[Path], config: RunConfig, task: str, method: str, points: int, more: dict) -> Result:
    """The line between two runs' adapters on test, as a record."""
    started = time.time()
    benches = []

    def bench_of(folder: Path):
        benches.append(build(config, [task], adapter=folder, splits=("test",)))
        return benches[0]

    curve = interpolate(
        *(load_adapter_weights(folder) for folder in folders),
        method=method,
        alphas=np.linspace(0.0, 1.0, points),
        bench_of=bench_of,
        split="test",
        task=task,
        batch_size=config.train.per_device_eval_batch_size,
    )
    settings = {"label": config.schedule.method, "merge_method": method, "split": "test", "task": task,
                "points": points, **more, **config.flat()}  # fmt: skip
    return curve_record(curve, settings, benches[0], time.time() - started)


def _portable(result: Result) -> Result:
    """A record without the folders of the machine it was made on."""
    for key in ("output_dir", "data_root"):
        result.config[key] = None
    return result
