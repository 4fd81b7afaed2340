"""How good is an adapter when parts of it are taken away?

For every run of a plan, trained before: each structured variant, the unstructured curves over densities, and
the quantised ones, evaluated on one loaded model; beside it the same for the checkpoint at T/4 ("Early CopRA"),
which is trained again where a run has kept none.

One record an adapter. What has a record is not evaluated again, and a stopped adapter goes on after its last
variant.

Source: CopRA (arXiv 2410.22911), section 3.2 and figure 4.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from copra_llm.adapters import AdapterWeights, load_adapter_weights
from copra_llm.config import RunConfig, read_settings, read_yaml, typed
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.protocols.connectivity import portable
from copra_llm.prune import Variant, size, structured_names
from copra_llm.results import Result, pack_bits, peak_memory_bytes, write_atomic, write_result
from copra_llm.tasks.mtl15 import get_task
from copra_llm.train import train_adapter

EARLY = 0.25
"""The fraction of the run after which the early checkpoint is taken."""
DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
COMBINED = (Variant("every-other", quantise="nf4"), Variant(density=0.5, by="magnitude", quantise="nf4"))
"""Pruned and quantised at once."""


@dataclass(frozen=True)
class Plan:
    """Which runs of one model are pruned, and how."""

    tasks: list[str]
    methods: list[str]
    seeds: list[int]
    densities: list[float]
    """Of the unstructured curves."""
    by: list[str]
    """How their entries are chosen: a curve each."""
    quantise: list[str]
    early_tasks: list[str]
    """Where the checkpoint at T/4 is evaluated too; it must be trained again if the run has not kept it."""
    early_methods: list[str]

    def __post_init__(self):
        for name in ("tasks", "methods", "seeds"):
            if not getattr(self, name):
                raise InputError(f"the plan's {name} is empty; give at least one")
        for task, method in itertools.product([*self.tasks, *self.early_tasks], [*self.methods, *self.early_methods]):
            get_task(task)
            RunConfig().replace(method=method)
        self.variants([], 0)

    def variants(self, keep: Iterable[str], seed: int) -> list[Variant]:
        """Everything that is evaluated of an adapter; `keep` are its structured variants, `seed` is of `random`."""
        curves = [Variant(density=d, by=by, seed=seed) for by in self.by for d in self.densities]
        quantised = [Variant(quantise=kind) for kind in self.quantise]
        return [Variant(keep=name) for name in keep] + curves + quantised + (list(COMBINED) if quantised else [])


FIGURE = Plan(["sst2"], ["copra"], [0], list(DENSITIES), ["magnitude", "matrix", "random"], ["int8", "nf4"], [], [])
"""Its variants are what `copra prune --task` evaluates unless it is told otherwise."""


def read_plan(path: Path) -> dict[str, Plan]:
    """`{model: Plan}` from YAML; `all` holds what the models share.

    Raises:
        InputError: if the file or an entry is not of that form.
    """
    values = read_yaml(Path(path))
    types = get_type_hints(Plan)
    for name, entry in values.items():
        if not isinstance(entry, dict):
            raise InputError(f"{path}: {name} is {entry!r}, but must hold {', '.join(types)}")
    shared = values.pop("all", {})
    plans = {}
    for model, own in values.items():
        entry = shared | own
        wrong = sorted(set(types) ^ set(entry))
        if wrong:
            what = f"lacks {wrong[0]}" if wrong[0] in types else f"has the unknown entry {wrong[0]}"
            raise InputError(f"{path}: the plan of {model} {what}; it needs {', '.join(types)}")
        plans[model] = Plan(**{key: typed(path, key, value, types[key]) for key, value in entry.items()})
    return plans


def run_plan(
    model: str, plan: Plan, runs: Path, results: Path, work: Path, data_root: str | None, say=print, progress=iter
) -> None:
    """Do what is missing of a plan.

    Args:
        model: name of the folder below `runs`.
        plan: from `read_plan`.
        runs: adapters lie in `runs/<model>/<task>/<method>/<run>/`, as training writes them.
        results: records go to `results/<model>/<task>/<method>/<run>[-early].json`.
        work: runs without a checkpoint at T/4 are trained again here.
        data_root: of MTL15; None: as the runs' settings say.
        say: reports progress.
        progress: wraps the iterable of variants.
    """
    evaluator: AdapterEvaluator | None = None
    for task, method in itertools.product(plan.tasks, plan.methods):
        for run in find_runs(runs / model / task / method, plan.seeds):
            config = RunConfig.from_flat(read_settings(run / "config.yaml"))
            if data_root is not None:
                config = config.replace(data_root=data_root)
            wanted = {"final": results / model / task / method / f"{run.name}.json"}
            if task in plan.early_tasks and method in plan.early_methods:
                wanted["early"] = results / model / task / method / f"{run.name}-early.json"
            for checkpoint, record in wanted.items():
                if record.is_file():
                    continue
                folder = run if checkpoint == "final" else early_checkpoint(run, config, work / model / task / method)
                weights = load_adapter_weights(folder)
                # One loaded model serves all runs of a task.
                if evaluator is None or _loads(evaluator.config) != _loads(config):
                    evaluator = AdapterEvaluator(config, [task], "test")
                keep = structured_names(weights, config.schedule.layer_pattern)
                result = pruning_record(
                    weights,
                    config,
                    task,
                    plan.variants(keep, config.train.seed),
                    evaluator,
                    checkpoint=checkpoint,
                    unfinished=unfinished(record),
                    progress=progress,
                )
                finish(record, portable(result))
                say(f"{record}: {summary(result)} in {result.seconds:.0f} s")


def unfinished(record: Path) -> Path:
    """The file that keeps an adapter's finished variants until its record is written."""
    return record.with_name(f"{record.name}.partial")


def finish(record: Path, result: Result) -> None:
    """Write the record; what was kept until then goes."""
    write_result(record, result)
    unfinished(record).unlink(missing_ok=True)


def find_runs(folder: Path, seeds: Sequence[int]) -> list[Path]:
    """The finished runs in a folder whose settings were trained with every one of the seeds, in that order.

    Runs that only tuned the settings, with one seed, are so left out.

    Raises:
        InputError: if there are none.
    """
    groups: dict[str, dict[int, Path]] = {}
    for run in sorted(p.parent for p in folder.glob("*/config.yaml") if (p.parent / "adapter").is_dir()):
        settings = read_settings(run / "config.yaml")
        own = ("seed", "output_dir", "data_root", "resume_from_checkpoint", "checkpoint_at")
        rest = json.dumps({key: value for key, value in sorted(settings.items()) if key not in own})
        groups.setdefault(rest, {})[settings.get("seed", 0)] = run
    found = [group[seed] for group in groups.values() if set(seeds) <= set(group) for seed in seeds]
    if not found:
        raise InputError(f"{folder} has no settings trained with each of the seeds {', '.join(map(str, seeds))}; "
                         "train them first, or give other --runs")  # fmt: skip
    return found


def early_checkpoint(run: Path, config: RunConfig, work: Path) -> Path:
    """The adapter after a quarter of the run: its own checkpoint, or that of the same run repeated below `work`."""
    if config.train.max_steps < 1:
        raise InputError(f"{run / 'config.yaml'} has no max_steps, so its T/4 is not known; train with --max_steps")
    name = f"checkpoint-{max(1, round(EARLY * config.train.max_steps))}"
    if (run / name).is_dir():
        return run / name
    again = work / run.name
    if not (again / "result.json").is_file() or not (again / name).is_dir():
        changes = {"checkpoint_at": [EARLY], "output_dir": str(again), "resume_from_checkpoint": "latest"}
        train_adapter(config.replace(**changes), config.data.tasks, again)
    return again / name


def pruning_record(
    weights: AdapterWeights,
    config: RunConfig,
    task: str,
    variants: Sequence[Variant],
    evaluator: AdapterEvaluator,
    *,
    checkpoint: str = "final",
    settings: dict[str, Any] | None = None,
    unfinished: Path | None = None,
    progress: Callable = iter,
) -> Result:
    """All variants of an adapter as a result record.

    Args:
        weights: the adapter.
        config: the run's settings, kept in the record.
        task: what is evaluated, on the evaluator's split.
        variants: what is made of the adapter.
        evaluator: the model and the split.
        checkpoint: "final" or "early".
        settings: more entries for the record's config.
        unfinished: file that keeps the finished variants while the others are evaluated.
        progress: wraps the iterable of variants.
    """
    started = time.time()
    own = {"split": evaluator.split, "task": task, "checkpoint": checkpoint, **(settings or {})}
    pattern = config.schedule.layer_pattern
    rows = evaluate_variants(weights, variants, evaluator, task, pattern, unfinished, progress)
    evaluator.attach(weights)  # the environment is the model's, which is not loaded yet if every row was kept
    return Result(
        protocol="pruning",
        config=own | config.flat(),
        metrics={f"{evaluator.split}/{task}/accuracy/{r['name']}@{r['density']:g}": r["accuracy"] for r in rows},
        seconds=time.time() - started,
        peak_memory_bytes=peak_memory_bytes(),
        data={"rows": rows},
        environment=evaluator.environment(),
    )


def evaluate_variants(
    weights: AdapterWeights,
    variants: Sequence[Variant],
    evaluator: AdapterEvaluator,
    task: str,
    layer_pattern: str | None = None,
    unfinished: Path | None = None,
    progress: Callable = iter,
) -> list[dict[str, Any]]:
    """A row a variant: kind, name, density, accuracy [percent], loss [nats], correct, parameters, bytes."""
    stamp = _stamp(weights, evaluator, task, repr((sorted({v.seed for v in variants}), layer_pattern)))
    done = _unfinished_rows(unfinished, stamp)
    for variant in progress(variants):
        key = (variant.name, variant.density)
        if key in done:
            continue
        # At density 1 nothing is chosen: what has been evaluated without choosing is the same adapter.
        same = replace(variant, by=None) if variant.density == 1.0 else variant
        row = done.get((same.name, same.density)) or _evaluate(weights, same, evaluator, task, layer_pattern)
        done[key] = row | {"kind": variant.kind, "name": variant.name}
        if unfinished is not None:
            write_atomic(unfinished, json.dumps({"of": stamp, "rows": list(done.values())}))
    return [done[variant.name, variant.density] for variant in variants]


def summary(record: Result) -> str:
    """One line: the accuracy of the whole adapter and of the structured variants."""
    rows = [row for row in record.data["rows"] if row["kind"] == "structured"]
    return ", ".join(f"{row['name']} {row['accuracy']:.1f}" for row in rows)


def _evaluate(
    weights: AdapterWeights, variant: Variant, evaluator: AdapterEvaluator, task: str, layer_pattern: str | None
) -> dict[str, Any]:
    pruned = variant.of(weights, layer_pattern)
    outcome = evaluator(pruned, task)
    return {
        "kind": variant.kind,
        "name": variant.name,
        "density": variant.density,
        "accuracy": outcome.accuracy,
        "loss": outcome.loss,
        "correct": pack_bits(outcome.correct),
        "parameters": size(pruned).parameters,
        "bytes": variant.bytes_of(pruned),
    }


def _loads(config: RunConfig) -> tuple:
    """What an evaluator has loaded."""
    return config.model, config.data


def _stamp(weights: AdapterWeights, evaluator: AdapterEvaluator, task: str, more: str) -> str:
    """Tells an unfinished file of this adapter, model and data from that of others."""
    digest = hashlib.sha256(repr((_loads(evaluator.config), evaluator.split, task, more)).encode())
    for key, tensor in sorted(weights.state_dict().items()):
        digest.update(key.encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()


def _unfinished_rows(file: Path | None, stamp: str) -> dict[tuple[str, float], dict[str, Any]]:
    if file is None or not file.is_file():
        return {}
    kept = json.loads(file.read_text(encoding="utf-8"))
    return {(row["name"], row["density"]): row for row in kept["rows"]} if kept["of"] == stamp else {}
