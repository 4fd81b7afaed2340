"""How do defaults, YAML and command line combine to the settings of a run?

    defaults  <  --config FILE (flat YAML, the flags' names)  <  --key value

A hyphen for an underscore is accepted. The settings themselves are in `settings.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from copra_llm.errors import InputError, named, nearest, shown
from copra_llm.json_file import is_unicode
from copra_llm.settings import (
    DataSettings,
    HubSettings,
    ImageSettings,
    InstructSettings,
    LoraSettings,
    ModelSettings,
    PartSettings,
    ScheduleSettings,
    TrainSettings,
)
from copra_llm.yaml_file import LARGEST, read_yaml, typed


@dataclass(frozen=True)
class RunConfig:
    """All settings of a training run, each group with its owner."""

    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    data: DataSettings = field(default_factory=DataSettings)
    part: PartSettings = field(default_factory=PartSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    hub: HubSettings = field(default_factory=HubSettings)
    instruct: InstructSettings | None = None
    """Of runs on conversations alone."""
    image: ImageSettings | None = None
    """Of runs on images alone."""

    def __post_init__(self):
        for key, value in self.flat().items():
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, int) and abs(entry) > LARGEST:
                    raise InputError(f"--{key} is {shown(entry)}, but must lie within 2**64")
                if isinstance(entry, str) and not is_unicode(entry):
                    raise InputError(f"--{key} is {shown(entry)}, but must be UTF-8 text")

    def flat(self) -> dict[str, Any]:
        """The settings under the flags' names, as `config.yaml` and the result record hold them."""
        groups = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return {k: v for group in groups if group is not None for k, v in vars(group).items()}

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `flat`; settings that are absent keep their defaults.

        Raises:
            InputError: for a name that is no setting.
        """
        names = [f.name for group in ALL for f in dataclasses.fields(group)]
        unknown = next((name for name in values if name not in names), None)
        if unknown is not None:
            raise InputError(f'there is no setting "{unknown}"{nearest(unknown, names)}')
        parts = {}
        for part, kind in zip(dataclasses.fields(cls), ALL, strict=True):
            own = {f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}
            if kind in COMMON or own.keys() - {SHARED} or (own and kind is _owner_of_shared(values)):
                parts[part.name] = kind(**own)
        return cls(**parts)

    def replace(self, **changes: Any) -> RunConfig:
        """A copy with some settings changed, by the flags' names."""
        return self.from_flat(self.flat() | changes)


COMMON = (ModelSettings, LoraSettings, ScheduleSettings, DataSettings, PartSettings, TrainSettings, HubSettings)
"""The groups of every run."""
ALL = (*COMMON, InstructSettings, ImageSettings)
"""All groups, in the order of `RunConfig`."""
DEFAULTS = {f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default
            for group in ALL for f in dataclasses.fields(group)}  # fmt: skip
"""Of every setting: what a record from before a setting was there had."""
SHARED = "dataset_name"
"""The one setting that two groups have: of a run that has either of them."""


def _owner_of_shared(values: dict[str, Any]) -> type:
    """Whose `SHARED` is, if no other setting of either group says."""
    image = {f.name for f in dataclasses.fields(ImageSettings)} - {SHARED}
    return ImageSettings if image & values.keys() else InstructSettings


def parse_run_config(
    argv: list[str] | None = None,
    description: str | None = None,
    groups: tuple[type, ...] = COMMON,
    defaults: dict[str, Any] | None = None,
) -> RunConfig:
    """Read a recipe's command line.

    Args:
        argv: the words; None: those of the process.
        description: of the recipe, for `--help`.
        groups: of settings the recipe has, some of `ALL`.
        defaults: where the recipe's differ.

    Raises:
        InputError: for an unknown flag or key, a value of the wrong kind, or settings that contradict.
    """
    from transformers import HfArgumentParser

    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(groups, description=description, allow_abbrev=False, exit_on_error=False)
    parser.error = _raise_input_error
    parser.add_argument("--config", metavar="FILE", help="Flat YAML with the names below; flags win over it.")
    parser.set_defaults(**defaults or {})
    names = sorted({name for group in groups for f in dataclasses.fields(group) for name in (f.name, *_aliases(f))})
    _refuse_unknown_flags(argv, [*names, "config", "help"], negated=[n for n in names if f"--no_{n}" in argv])
    try:
        config_file = _flag_value(argv, "config")
        if config_file is not None:
            parser.set_defaults(**read_settings(Path(config_file)))
        *parts, _ = parser.parse_args_into_dataclasses(args=argv)
    except InputError:
        raise
    except (ValueError, TypeError, OverflowError, argparse.ArgumentError) as error:
        _raise_input_error(str(error))
    names = {group: part.name for group, part in zip(ALL, dataclasses.fields(RunConfig), strict=True)}
    return RunConfig(**{names[group]: part for group, part in zip(groups, parts, strict=True)})


def _aliases(setting: dataclasses.Field) -> list[str]:
    return [flag.removeprefix("--") for flag in setting.metadata.get("aliases", ()) if "_" in flag]


def dump_yaml(config: RunConfig) -> str:
    """The resolved settings, ready for `--config`."""
    import yaml

    return yaml.safe_dump(config.flat(), sort_keys=False, allow_unicode=True)


def _raise_input_error(message: str) -> None:
    raise InputError(f"command line: {message if len(message) < 400 else message[:400] + '...'}; see --help")


def _refuse_unknown_flags(argv: list[str], known: list[str], negated: list[str]) -> None:
    for word in argv:
        if not word.startswith("--") or word == "--":
            continue
        flag = word[2:].split("=", 1)[0].replace("-", "_")
        if flag not in known and flag.removeprefix("no_") not in negated:
            raise InputError(f"there is no flag --{flag[:100]}{nearest(flag[:100], known)}; see --help")


def _flag_value(argv: list[str], name: str) -> str | None:
    for i, word in enumerate(argv):
        if word == f"--{name}":
            if i + 1 == len(argv):
                raise InputError(f"--{name} needs a value; give a YAML file of settings")
            return argv[i + 1]
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return None


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a flat YAML file, each of its field's type.

    Raises:
        InputError: if the file is missing, is no YAML, or holds an unknown name or a value of the wrong type.
    """
    return typed_settings(path, read_yaml(path))


def typed_settings(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """`values`, found in `path`, each of its setting's type.

    Raises:
        InputError: for an unknown name or a value of the wrong type.
    """
    types = {name: hint for group in ALL for name, hint in get_type_hints(group).items()}
    own = {alias: f.name for group in ALL for f in dataclasses.fields(group) for alias in _aliases(f)}
    values = {own.get(key, key) if isinstance(key, str) else key: value for key, value in values.items()}
    for key in values:
        if key not in types:
            hint = nearest(str(key)[:100], types)
            raise InputError(f"{path}: there is no setting {named(key)}{hint or '; see --help'}")
    return {key: typed(path, key, value, types[key]) for key, value in values.items()}
