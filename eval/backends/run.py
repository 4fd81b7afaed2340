"""Is it the same run on every backend, and what does it cost?

    python eval/backends/run.py [--backends ddp zero2] [--methods lora copra]

Each entry of plan.yaml is started by `accelerate launch` with its configuration, on CPUs. Its adapter is compared
with that of one process on the same examples, and its step with that one's. What needs a GPU is left out. The run on
one process, to which all is relative, is done anew at each call, before the others.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launching import ROOT, launch

from copra_llm.adapters import load_adapter_weights
from copra_llm.config import RunConfig, dump_yaml
from copra_llm.errors import InputError, exit_on_input_error
from copra_llm.models import resolve
from copra_llm.protocols.command import add_folder, chosen_plans, protocol_parser, say
from copra_llm.results import Result, read_result, write_atomic, write_result

HERE = Path(__file__).parent
RECIPE = ROOT / "recipes" / "train_mtl15.py"
REFERENCE = "one"
"""The entry of the plan to which the others are compared."""
WARM_UP = 5
"""Steps at the beginning whose time does not count."""


@dataclass(frozen=True)
class BackendPlan:
    """One way to launch the same run."""

    label: str
    """What the table calls it."""
    config: str
    """File of accelerate_configs/."""
    model: str
    tasks: list[str]
    """One."""
    methods: list[str]
    batch: int
    """Examples of an optimizer step, on all processes together."""
    flags: list[str] = field(default_factory=list)
    """Further flags of `accelerate launch`; {rank} stands for the machine's number."""
    processes: int = 2
    nodes: int = 1
    """Machines."""
    micro_batches: int = 1
    """Of a process, to an optimizer step."""
    needs_gpu: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the run."""

    def run_config(self, method: str, model: Path, data_root: str | None, output: Path) -> RunConfig:
        """Settings of the run.

        Raises:
            InputError: if the batch cannot be divided among the processes.
        """
        parts = self.processes * self.micro_batches
        if self.batch % parts:
            raise InputError(f"the plan of {self.label} has a batch of {self.batch}, which {parts} parts cannot share")
        return RunConfig().replace(**self.settings | {
            "model_name_or_path": str(model), "tasks": self.tasks, "method": method, "data_root": data_root,
            "per_device_train_batch_size": self.batch // parts, "gradient_accumulation_steps": self.micro_batches,
            "output_dir": str(output),
        })  # fmt: skip


def without_dropout(name: str, folder: Path) -> Path:
    """A copy of a model whose configuration has every dropout at 0: its noise differs from process to process."""
    model = folder / name
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(resolve(name).load_from, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {key: 0.0 for key in config if "dropout" in key and isinstance(config[key], float)}
    write_atomic(model / "config.json", json.dumps(config))
    return model


def measure(plan: BackendPlan, config: RunConfig) -> dict[str, Any]:
    """Launch a run; what the processes saw of it, and what they said where it failed.

    Args:
        plan: how to launch.
        config: its settings.
    """
    output = Path(config.train.output_dir)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    write_atomic(output / "run.yaml", dump_yaml(config))
    script = [HERE / "meter.py", output, RECIPE, "--config", output / "run.yaml"]
    codes = launch(plan.config, plan.flags, script, output / "logs", plan.processes, plan.nodes)
    said = "\n".join(log.read_text(encoding="utf-8") for log in sorted((output / "logs").glob("*.log")))
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("rank-*.json"))]
    record = output / plan.tasks[0] / "result.json"
    whole = not any(codes) and len(ranks) == plan.processes and record.is_file()
    if not whole or read_result(record).environment["world_size"] != plan.processes:
        return {"starts": 0.0, "said": said[-2000:]}
    return {"starts": 1.0, "adapter": record.parent / "adapter", "environment": read_result(record).environment,
            "seconds": read_result(record).seconds, **steps_of(ranks)}  # fmt: skip


def steps_of(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """What a step takes: seconds (median), CPU seconds of all processes (median), bytes sent (mean), peak memory.

    Args:
        ranks: of each process what `meter.py` writes.
    """
    taken = [[[b - a for a, b in zip(*pair, strict=True)] for pair in zip(r["ticks"], r["ticks"][1:], strict=False)]
             for r in ranks]  # fmt: skip
    wall, cpu, _ = zip(*(zip(*steps[WARM_UP:], strict=True) for steps in taken), strict=True)
    sent: dict[int, float] = {}
    for rank in ranks:
        first, *_, last = rank["ticks"]
        sent[rank["network"]] = (last[2] - first[2]) / (len(rank["ticks"]) - 1)
    return {
        "seconds_per_step": statistics.median(wall[0]),
        "cpu_seconds_per_step": sum(map(statistics.median, cpu)),
        "bytes_per_step": sum(sent.values()),
        "peak_memory_bytes": max(rank["peak_memory_bytes"] for rank in ranks),
    }


def largest_difference(adapter: Path, reference: Path) -> float:
    """Over the modules: the distance of Delta W to the reference's, relative to its norm."""
    ours, theirs = load_adapter_weights(adapter).factors, load_adapter_weights(reference).factors
    if ours.keys() != theirs.keys():
        return float("inf")
    pairs = [(ours[name].delta_weight(), theirs[name].delta_weight()) for name in theirs]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def records(name: str, plan: BackendPlan, method: str, config: RunConfig, reference: dict[str, Any]) -> Result:
    """The record of an entry and method, next to the reference's measurements."""
    seen = reference if name == REFERENCE else measure(plan, config)
    metrics = {key: value for key, value in seen.items() if isinstance(value, float | int)}
    seconds = metrics.pop("seconds", 0.0)
    if seen["starts"]:
        metrics["largest_difference"] = largest_difference(seen["adapter"], reference["adapter"])
        for key in ("seconds_per_step", "cpu_seconds_per_step"):
            metrics[f"ratio/{key}"] = seen[key] / reference[key]
    settings = config.flat() | {"model_name_or_path": plan.model, "output_dir": None, "data_root": None}
    launched = {"backend": name, "label": plan.label, "launch_config": plan.config, "launch_flags": plan.flags,
                "processes": plan.processes, "nodes": plan.nodes}  # fmt: skip
    data = {} if seen["starts"] else {"said": seen["said"]}
    return Result("backends", settings | launched, metrics, seconds, int(metrics.get("peak_memory_bytes", 0)),
                  config.train.max_steps, config.train.max_steps * plan.batch, data,
                  seen.get("environment", {}))  # fmt: skip


def run(chosen: dict[str, BackendPlan], reference: BackendPlan, data_root: str | None, work: Path) -> Iterator[Result]:
    """The records of the chosen entries, method by method.

    Raises:
        InputError: if the reference itself does not run.
    """
    model = without_dropout(reference.model, work)
    for method in reference.methods:
        base = reference.run_config(method, model, data_root, work / REFERENCE / method)
        measured = measure(reference, base)
        if not measured["starts"]:
            raise InputError(f"the run on one process has failed; see {work / REFERENCE / method}/logs")
        for name, plan in chosen.items():
            if method in plan.methods and not plan.needs_gpu:
                config = plan.run_config(method, model, data_root, work / name / method)
                yield records(name, plan, method, config, measured)


@exit_on_input_error
def main() -> None:
    parser = protocol_parser(__doc__, HERE, entries="backends")
    add_folder(parser, "--work", "runs/backends", "adapters and logs")
    args = parser.parse_args()
    chosen = dict(chosen_plans(args, BackendPlan))
    args.entries = [REFERENCE]
    ((_, reference),) = chosen_plans(args, BackendPlan)
    reference = dataclasses.replace(reference, methods=sorted({m for plan in chosen.values() for m in plan.methods}))
    for result in run(chosen, reference, args.data_root, args.work.resolve()):
        name, method = result.config["backend"], result.config["method"]
        write_result(args.results / f"{name}-{method}.json", result)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in result.metrics.items())
        say(f"{name}, {method}: {shown}")


if __name__ == "__main__":
    sys.exit(main())
