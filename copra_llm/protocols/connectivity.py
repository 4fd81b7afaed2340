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

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from copra_llm.adapters import load_adapter_weights
from copra_llm.config import RunConfig, read_yaml, typed, typed_settings
from copra_llm.errors import InputError
from copra_llm.interpolate import line, line_record
from copra_llm.merge import check_line
from copra_llm.results import Result, read_result, write_result
from copra_llm.tasks.mtl15 import get_task
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

    def __post_init__(self):
        for name in ("tasks", "methods", "seeds", "learning_rate", "max_steps"):
            if not getattr(self, name):
                raise InputError(f"the plan's {name} is empty; give at least one")
        for task, method in itertools.product(self.tasks, self.methods):
            get_task(task)
            RunConfig().replace(**self.settings | {"tasks": [task], "method": method})
        for merge_method, points in self.points.items():
            check_line(merge_method)
            line(points)


def read_plan(path: Path) -> dict[str, Plan]:
    """`{model: Plan}` from YAML; `all` holds what the models share.

    Raises:
        InputError: if the file or an entry is not of that form.
    """
    values = read_yaml(Path(path))
    for name, entry in values.items():
        if not isinstance(entry, dict):
            raise InputError(f"{path}: {name} is {entry!r}, but must hold {', '.join(Plan.__dataclass_fields__)}")
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
        types = get_type_hints(Plan)
        for key in ("tasks", "methods", "seeds", "learning_rate", "max_steps"):
            entry[key] = typed(path, key, entry[key], types[key])
        if not isinstance(entry["points"], dict):
            raise InputError(f"{path}: points is {entry['points']!r}, but must be points by merge method")
        entry["points"] = {m: typed(path, f"points of {m}", p, int) for m, p in entry["points"].items()}
        entry["settings"] = typed_settings(path, entry["settings"])
        plans[model] = Plan(**entry)
    return plans


def run_plan(model: str, plan: Plan, results: Path, work: Path, data_root: str | None, say=print) -> None:
    """Do what is missing of a plan.

    Args:
        model: `--model_name_or_path`.
        plan: from `read_plan`.
        results: records go to `results/<model>/<task>/<method>/*.json`, <model> being a folder's last part.
        work: adapters and checkpoints go here, under the same names.
        data_root: of MTL15.
        say: reports progress.
    """
    for task, method in itertools.product(plan.tasks, plan.methods):
        place = Path(_portable_name(model)) / task / method
        records, scratch = results / place, work / place
        base = RunConfig().replace(
            **plan.settings | {"model_name_or_path": model, "tasks": [task], "method": method, "data_root": data_root}
        )

        def train(seed, rate, steps, adapter_wanted, base=base, task=task, records=records, scratch=scratch) -> Result:
            """A run's record, from disk if it is there (with its adapter beside the work, where one is wanted)."""
            name = f"lr{rate:g}-steps{steps}-seed{seed}"
            record, adapter = records / f"{name}.json", scratch / name / "adapter"
            if not record.is_file() or (adapter_wanted and not adapter.is_dir()):
                config = base.replace(
                    seed=seed, learning_rate=rate, max_steps=steps, output_dir=str(scratch / name),
                    resume_from_checkpoint="latest",
                )  # fmt: skip
                result = train_adapter(config, [task], scratch / name)
                write_result(record, _portable(result))
                say(f"{record}: dev {result.metrics[f'dev/{task}/accuracy']:.1f} in {result.seconds:.0f} s")
            return read_result(record)

        rate, steps = tune(lambda r, s: dev_score(train(plan.seeds[0], r, s, False), task), plan)  # noqa: B023
        lines = {
            (pair, merge_method): records / f"{merge_method}-lr{rate:g}-steps{steps}-seeds{pair[0]}-{pair[1]}.json"
            for pair, merge_method in itertools.product(itertools.combinations(plan.seeds, 2), plan.points)
        }
        missing = {line: record for line, record in lines.items() if not record.is_file()}
        for seed in plan.seeds:
            train(seed, rate, steps, any(seed in pair for pair, _ in missing))
        for (pair, merge_method), record in missing.items():
            curve = line_record(
                [load_adapter_weights(scratch / f"lr{rate:g}-steps{steps}-seed{seed}") for seed in pair],
                base.replace(learning_rate=rate, max_steps=steps),
                task,
                method=merge_method,
                points=plan.points[merge_method],
                settings={"seeds": list(pair)},
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
    return result.metrics[f"dev/{task}/accuracy"], -math.inf if math.isnan(loss) else -loss


def _portable(result: Result) -> Result:
    """A record without the folders of the machine it was made on."""
    config = result.config | {"output_dir": None, "data_root": None}
    config["model_name_or_path"] = _portable_name(config["model_name_or_path"])
    environment = result.environment | {"base_model": _portable_name(result.environment["base_model"])}
    return dataclasses.replace(result, config=config, environment=environment)


def _portable_name(model: str) -> str:
    """A model's name as it is, but of a folder or file its last part."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model
