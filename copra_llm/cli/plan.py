"""`copra plan`: what a run will need, before it is started.

copra plan --model_name_or_path smollm2 --max_length 512 --max_steps 500
copra plan --model_name_or_path smollm2 --num_nodes 2 --processes_per_node 8 --backend ddp fsdp2 zero3 --max_steps 500
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

from copra_llm.errors import InputError
from copra_llm.plan.cluster import ClusterSettings, ShapeSettings
from copra_llm.settings import DataSettings, LoraSettings, ModelSettings, ScheduleSettings, TrainSettings

HELP = (
    "Say what a run will need: memory by part, bytes between processes, time, files. Flags are those of the recipes; "
    "no weights are loaded. Memory is counted on the model itself, times are estimates: docs/large-runs.md."
)

_TRAIN = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16",
          "gradient_checkpointing")  # fmt: skip
_GROUPS = {
    ModelSettings: None,
    ShapeSettings: None,
    LoraSettings: None,
    ScheduleSettings: ("method", "p_start", "p_end", "ramp_fraction", "ramp_shape", "granularity", "layer_pattern"),
    DataSettings: ("max_length",),
    TrainSettings: _TRAIN,
    ClusterSettings: None,
}
"""Groups of settings -> those that a plan depends on; None: all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for group, names in _GROUPS.items():
        types = get_type_hints(group)
        for setting in dataclasses.fields(group):
            if names is None or setting.name in names:
                _add(parser, setting, types[setting.name])
    parser.add_argument("--json", metavar="FILE", help="write the figures, in bytes and seconds, as a result record")


def run(args: argparse.Namespace) -> int:
    from copra_llm.config import RunConfig
    from copra_llm.plan.estimate import make_plan
    from copra_llm.plan.show import record, tables
    from copra_llm.results import write_result

    if args.json is not None and Path(args.json).is_dir():
        raise InputError(f"--json names {args.json}, which is a folder; give a file")
    shape, cluster = _made(ShapeSettings, args), _made(ClusterSettings, args)
    if shape.given and args.model_name_or_path is not None:
        raise InputError(f"--model_name_or_path {args.model_name_or_path} and --hidden_size were both given, but sizes "
                         "take the place of a name; give one of them")  # fmt: skip
    own = {name: value for group in _GROUPS if group not in (ShapeSettings, ClusterSettings)
           for name, value in vars(_made(group, args)).items() if _of(group, name)}  # fmt: skip
    config = RunConfig().replace(**own)
    plan = make_plan(config, cluster, shape)
    print(tables(plan), end="")
    if args.json is not None:
        settings = own | vars(cluster) | (vars(shape) if shape.given else {})
        write_result(Path(args.json), record(plan, settings))
    return 0


def _add(parser: argparse.ArgumentParser, setting: dataclasses.Field, hint) -> None:
    flags = list(dict.fromkeys((f"--{setting.name}", f"--{setting.name.replace('_', '-')}")))
    options: dict = {"help": setting.metadata["help"].replace("%", "%%"), "default": None}
    kind = next(k for k in get_args(hint) if k is not NoneType) if isinstance(hint, UnionType) else hint
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(kind) is list:
        options |= {"nargs": "+", "type": get_args(kind)[0]}
    else:
        options["type"] = kind
    parser.add_argument(*flags, **options)


def _of(group: type, name: str) -> bool:
    return _GROUPS[group] is None or name in _GROUPS[group]


def _made(group: type, args: argparse.Namespace):
    """The settings of a group, with their defaults where no flag was given."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(group) if _of(group, f.name)}
    return group(**{name: value for name, value in given.items() if value is not None})
