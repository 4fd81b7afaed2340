"""Which records say the same thing about different seeds?

Records are repetitions of each other if model, task, method and every setting that can change the outcome agree; then
their mean and its interval mean something. Rows that would read alike but differ in a setting say so. What was run
twice with one seed counts once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copra_llm.config import DEFAULTS
from copra_llm.errors import InputError
from copra_llm.estimates import Estimate, seed_estimate
from copra_llm.results import Result
from copra_llm.settings import WITHOUT_EFFECT

ORDER = ("lora", "coto", "copra")
NAMES = {"lora": "LoRA", "copra": "CopRA", "coto": "CoTo"}

REPETITION = {
    # what differs between repetitions of a run
    "seed", "seeds", "split_seed", "random_seed", "adapter", "adapters", "points", "estimator_seed",
    # what a run's outcome does not depend on, or what is named apart
    *WITHOUT_EFFECT, "checkpoint_at", "max_nonfinite_steps",
    "label", "variant", "tasks", "task", "method", "model_name_or_path", "learning_rate", "max_steps",
}  # fmt: skip
"""Settings that do not keep two records apart."""


@dataclass(frozen=True)
class Group:
    """Repetitions: records of one model, task, label and settings."""

    model: str
    task: str
    """As it is shown: with the number n of test examples, where records of one task have different ones."""
    task_key: str
    """As it is in the names of metrics."""
    label: str
    """Method or variant, as it is shown."""
    learning_rate: float | None
    steps: int | None
    values: tuple
    """Of the keys that were grouped by beyond these."""
    records: list[Result]
    """In the order of their seeds."""
    settings: str = ""
    """What sets this group apart from one that is otherwise named alike; mostly empty."""

    @property
    def name(self) -> str:
        """Label and what sets it apart: the name of a series."""
        return f"{self.label} ({self.settings})" if self.settings else self.label

    @property
    def place(self) -> str:
        return f"{self.task}, {self.model}" if self.task else self.model

    @property
    def run(self) -> str:
        rate = "?" if self.learning_rate is None else f"{self.learning_rate:g}"
        return f"lr {rate}, {self.steps or '?'} steps"

    @property
    def heads(self) -> tuple:
        """What names the group in a table: model, task, label, learning rate, steps, other settings."""
        return self.model, self.task, self.label, self.learning_rate, self.steps, self.settings

    def estimate(self, value: Callable[[Result], float]) -> Estimate:
        """Mean of a number over the records, with its interval."""
        return seed_estimate([value(r) for r in self.records])

    def by_seed(self, value: Callable[[Result], float]) -> dict[int, float]:
        """A number of every record by its seed."""
        return {r.config["seed"]: value(r) for r in self.records}


def grouped(
    records: Iterable[Result],
    keys: Sequence[str] = (),
    tasks: Callable[[Result], Sequence[str]] | None = None,
    label: Callable[[Result], str] | None = None,
) -> list[Group]:
    """Records as repetitions, ordered by model, task, method, rate and steps.

    Args:
        records: of one protocol.
        keys: settings that are named beside model, task, label, learning rate and steps.
        tasks: of a record; default: its config's task or tasks, one group each.
        label: of a record; default `label_of`.
    """
    found: dict[tuple, list[Result]] = defaultdict(list)
    for r in records:
        named = tuple(_hashable(r.config.get(key)) for key in keys)
        rest = _rest(r, keys)
        for task in (tasks or tasks_of)(r):
            place = (model_of(r), task, _examples(r.data, task))
            where = (*place, (label or label_of)(r), r.config.get("learning_rate"), steps_of(r), *named)
            found[where, rest].append(r)
    counts: dict[tuple, set] = defaultdict(set)
    for (model, task, examples, *_), _ in found:
        counts[model, task].add(examples)
    groups = []
    for where, rest in sorted(found, key=lambda key: (_order(key[0]), key[1])):
        model, task, examples, name, rate, steps, *named = where
        shown = task if len(counts[model, task]) == 1 else f"{task} (n = {examples or '?'})"
        again = sorted(_once(found[where, rest]), key=_seeds)
        apart = _apart(where, rest, found)
        groups.append(Group(model, shown, task, name, rate, steps, tuple(named), again, apart))
    return groups


def by_place(groups: Iterable[Group]) -> list[tuple[str, list[Group]]]:
    """What belongs into one panel, with its title: a model and task.

    Where one name occurs there more than once, as in a sweep, a panel is for one learning rate and number of steps.
    """
    found: dict[tuple, list[Group]] = defaultdict(list)
    for g in groups:
        found[g.model, g.task].append(g)
    panels = []
    for here in found.values():
        names = [g.name for g in here]
        if len(set(names)) == len(names):
            panels.append((here[0].place, here))
            continue
        settings: dict[tuple, list[Group]] = defaultdict(list)
        for g in here:
            settings[g.learning_rate, g.steps].append(g)
        panels += [(f"{g[0].place}, {g[0].run}", g) for g in settings.values()]
    return panels


def label_of(r: Result) -> str:
    """Name of a record's method, or of its variant."""
    raw = r.config.get("variant") or r.config.get("label") or r.config.get("method") or "?"
    return NAMES.get(raw, str(raw))


def model_of(r: Result) -> str:
    """The model's name; of a folder its last part: where it lies on some machine says nothing."""
    name = str(r.config.get("model_name_or_path", "?"))
    return Path(name).name if name.startswith(("/", ".", "~")) or name.count("/") > 1 else name


def tasks_of(r: Result) -> list[str]:
    return [r.config["task"]] if "task" in r.config else list(r.config.get("tasks", [""]))


def steps_of(r: Result) -> int | None:
    """Optimizer steps of the training run."""
    return r.config.get("max_steps") or r.steps or None


def metric(r: Result, name: str, task: str | None = None, split: str | None = None) -> float:
    """`<split>/<task>/<name>` of a record.

    Raises:
        InputError: if the record has none.
    """
    key = f"{split or r.config['split']}/{task or r.config['task']}/{name}"
    if key not in r.metrics:
        raise InputError(f"a record of protocol {r.protocol}, made {r.created}, lacks metrics.{key}; run it again, or "
                         "leave it out")  # fmt: skip
    return r.metrics[key]


def styles(names: Iterable[str]) -> dict[str, int]:
    """Index of colour, marker and dash by name: the three methods have their own, others follow in order."""
    fixed = {NAMES[method]: i for i, method in enumerate(ORDER)}
    others = sorted(set(names) - set(fixed))
    return {**fixed, **{name: len(fixed) + i for i, name in enumerate(others)}}


def rank(label: str) -> tuple:
    """LoRA, CoTo, CopRA, then the others by name."""
    known = [NAMES[method] for method in ORDER]
    return (known.index(label) if label in known else len(known), label)


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the dotted parts that all of them share: "model.layers.3.q_proj" -> "3"."""
    parts = [name.split(".") for name in names]
    if len(set(names)) < 2:
        return list(names)
    start, end = 0, 0
    while all(len(p) > start + 1 and p[start] == parts[0][start] for p in parts):
        start += 1
    while all(len(p) > start + end + 1 and p[-1 - end] == parts[0][-1 - end] for p in parts):
        end += 1
    return [".".join(p[start : len(p) - end]) for p in parts]


def _once(records: Sequence[Result]) -> list[Result]:
    """One record a run: the same settings and seed again are no other sample. The finest, then the newest stays."""
    kept: dict[str, Result] = {}
    for r in sorted(records, key=lambda r: (r.config.get("points") or 0, r.created)):
        kept[str([r.config.get(key) for key in ("seeds", "seed", "adapters", "adapter")])] = r
    return list(kept.values())


def _seeds(r: Result) -> tuple:
    """In this order the records of two methods are pairs, as far as both have the same seeds."""
    seeds = r.config.get("seeds") or [r.config.get("seed", 0)]
    return (*map(str, seeds), r.created)


def _order(where: tuple) -> tuple:
    model, task, examples, label, *rest = where
    return (model, task, examples or 0, rank(label), *((value is not None, _sortable(value)) for value in rest))


def _sortable(value: Any) -> tuple:
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def _rest(r: Result, keys: Sequence[str]) -> tuple:
    """What else can change the outcome: settings that are set; a record from before a setting had its default."""
    config = DEFAULTS | r.config
    left = {k: v for k, v in config.items() if v is not None and k not in REPETITION and k not in keys}
    left["joint"] = " + ".join(r.config.get("tasks", [])) if r.config.get("joint") else None
    return tuple(sorted((k, str(v)) for k, v in left.items() if v is not None and v != [] and v != {}))


def _examples(data: Mapping[str, Any], task: str) -> int | None:
    """How many examples were evaluated, from the outcomes that the record holds: which data they are is not in it."""
    if data.get("correct"):
        return len(data["correct"][0])
    if data.get("rows"):
        return len(data["rows"][0].get("correct") or "") or None
    return len(data.get(f"correct/test/{task}", "")) or None


def _apart(where: tuple, rest: tuple, found: Mapping[tuple, Any]) -> str:
    """The settings in which groups of the same name differ."""
    rests = [dict(other) for place, other in found if place == where]
    differ = sorted({key for one in rests for key in one if len({r.get(key) for r in rests}) > 1})
    return ", ".join(f"{key} {dict(rest).get(key, 'unset')}" for key in differ)


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in sorted(value.items()))
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
