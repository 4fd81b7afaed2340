"""What does a protocol's plan.yaml hold?

    all:            # what the entries share
      seeds: [0, 1, 2]
    minilm:         # an entry a model, or whatever the protocol compares
      tasks: [sst2]
      settings: {lora_r: 4}

Each entry becomes one frozen dataclass of the protocol, its values of their fields' types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from copra_llm.adapters import AdapterWeights
from copra_llm.config import RunConfig, typed_settings
from copra_llm.errors import InputError, named, nearest, shown
from copra_llm.interpolate import line
from copra_llm.merge import check_line, check_options, merge
from copra_llm.tasks.clip.catalogue import image_task_names
from copra_llm.tasks.mtl15 import get_task
from copra_llm.yaml_file import read_yaml, typed

P = TypeVar("P")


def read_plans(path: Path, kind: type[P]) -> dict[str, P]:
    """`{name: kind(...)}` from YAML; a field `settings` holds run settings under the flags' names.

    Raises:
        InputError: if the file or an entry is not of that form.
    """
    path = Path(path)
    values, types = read_yaml(path), get_type_hints(kind)
    needed = {f.name for f in dataclasses.fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    for name, entry in values.items():
        if not isinstance(entry, dict):
            raise InputError(f"{path}: {named(name, '')} is {shown(entry)}, but must hold {', '.join(types)}")
    shared = values.pop("all", {})
    plans = {}
    for name, own in values.items():
        entry = shared | own
        if "settings" in types:
            entry["settings"] = _settings(path, "all", shared) | _settings(path, name, own)
        missing = sorted(needed - set(entry))
        unknown = sorted(set(entry) - set(types))
        if missing or unknown:
            what = f"lacks {missing[0]}" if missing else f"has the unknown entry {named(unknown[0], '')}"
            hint = nearest(unknown[0][:100], types) if unknown and not missing else ""
            raise InputError(f"{path}: the plan of {named(name, '')} {what}{hint}; it needs {', '.join(types)}")
        plans[name] = kind(**{key: _value(path, key, value, types[key]) for key, value in entry.items()})
    return plans


def check_runs(tasks: list[str], methods: list[str], settings: dict[str, Any]) -> None:
    """Refuse a plan's tasks, methods and settings before anything is run."""
    for task in tasks:
        # Conversations and images of one's own bear any name.
        if "dataset_name" not in settings and task not in image_task_names():
            get_task(task)
    check_methods(methods, settings)


def check_methods(methods: list[str], settings: dict[str, Any] | None = None) -> None:
    """Refuse a plan's methods and settings before anything is run.

    A plan for saved runs has no more to check: their tasks are whatever they were trained on.
    """
    for method in methods:
        RunConfig().replace(**(settings or {}) | {"method": method})


@dataclass(frozen=True)
class Rule:
    """A way to merge, as a plan names it."""

    name: str
    method: str
    """Key of `copra_llm.merge.METHODS`."""
    options: dict[str, Any]

    def __call__(self, adapters: Sequence[AdapterWeights], weights: Sequence[float] | None = None) -> AdapterWeights:
        return merge(adapters, self.method, weights, **self.options)


def merge_rules(entries: dict[str, Any]) -> list[Rule]:
    """The rules of `{name: {option: value}}`; where the name is no method, an entry `method` says which one it is.

    Raises:
        InputError: for a method or an option that is unknown.
    """
    rules = []
    for name, entry in entries.items():
        if not isinstance(entry, dict | None):
            raise InputError(
                f"the plan's merge rule {named(name, '')} is {shown(entry)}, but must hold `option: value` entries"
            )
        options = dict(entry or {})
        method = options.pop("method", name)
        rules.append(Rule(name, method, check_options(method, options)))
    return rules


def check_points(points: dict[str, int]) -> None:
    """Refuse a plan's `{merge method: points of the line}` before anything is run."""
    for method, count in points.items():
        check_line(method)
        line(count)


def tuned_settings(plan: Any, task: str, method: str) -> dict[str, Any]:
    """A plan's `settings` with what its `tuned` has for one task and method: `{task: {method: {setting: value}}}`.

    Raises:
        InputError: if `tuned` is not of that form.
    """
    own: Any = plan.tuned
    for key in (task, method):
        own = own.get(key, {}) if isinstance(own, dict) else own
    if not isinstance(own, dict):
        raise InputError(
            f"the plan's tuned has {shown(own)} for {method} on {task}, but must hold `setting: value` entries"
        )
    own = typed_settings(Path("the plan's tuned"), own)
    return plan.settings | own | {"tasks": [task], "method": method}


def need_entries(plan: Any, *names: str) -> None:
    """Refuse a plan whose fields `names` are not all filled."""
    for name in names:
        if not getattr(plan, name):
            raise InputError(f"the plan's {name} is empty; give at least one")


def _value(path: Path, key: str, value: Any, hint: Any) -> Any:
    if key == "settings":
        return typed_settings(path, value)
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise InputError(f"{path}: {key} is {shown(value)}, but must hold `name: value` entries")
        kind = get_args(hint)[1]
        return {name: v if kind is Any else _value(path, f"{key} of {name}", v, kind) for name, v in value.items()}
    return typed(path, key, value, hint)


def _settings(path: Path, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """An entry's own settings, `{}` where it has none."""
    found = entry.get("settings") or {}
    if not isinstance(found, dict):
        raise InputError(f"{path}: the settings of {name} are {shown(found)}, but must be a table of flags' names and "
                         "values")  # fmt: skip
    return found
