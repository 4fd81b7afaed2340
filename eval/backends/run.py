"""Is it the same run on every backend, and what does it cost?

    python eval/backends/run.py [--backends ddp zero2] [--methods lora copra]

Each entry of plan.yaml is started by `accelerate launch` with its configuration, on CPUs. Its adapter is compared with
that of one process on the same examples, its reference, which is run anew at each call, before the others. What needs
more GPUs than there are, or two nodes where none can be made, is left out.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import multi_node
import torch
from launching import ROOT, launch

from copra_llm.adapters import load_adapter_weights
from copra_llm.config import RunConfig, dump_yaml
from copra_llm.errors import InputError, exit_on_input_error
from copra_llm.models import resolve
from copra_llm.protocols.command import add_folder, chosen_plans, protocol_parser, say
from copra_llm.protocols.plans import read_plans
from copra_llm.results import Result, atomic_folder, read_result, write_atomic, write_result

HERE = Path(__file__).parent
RECIPE = ROOT / "recipes" / "train_mtl15.py"
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
    """Runs on GPUs, as many as processes, and nowhere else."""
    reference: str = "one"
    """The entry to which this one is compared."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the run."""

    def run_config(self, method: str, model: Path, data_root: str | None, output: Path) -> RunConfig:
        """Settings of the run.

        Raises:
            InputError: if the batch cannot be divided among the processes.
        """
        parts = self.processes * self.micro_batches
        if self.batch % parts:
            raise InputError(
                f"the plan of {self.label} has a batch of {self.batch}, which {parts} parts cannot share; "
                f"give a multiple of {parts}"
            )
        return RunConfig().replace(**self.settings | {
            "model_name_or_path": str(model), "tasks": self.tasks, "method": method, "data_root": data_root,
            "per_device_train_batch_size": self.batch // parts, "gradient_accumulation_steps": self.micro_batches,
            "output_dir": str(output),
        })  # fmt: skip


def without_dropout(name: str, folder: Path) -> None:
    """Write a copy of a model whose configuration has every dropout at 0: its noise differs from process to process."""
    with atomic_folder(folder) as fresh:
        shutil.copytree(resolve(name).load_from, fresh, dirs_exist_ok=True)
        config = json.loads((fresh / "config.json").read_text(encoding="utf-8"))
        config |= {key: 0.0 for key in config if "dropout" in key and isinstance(config[key], float)}
        write_atomic(fresh / "config.json", json.dumps(config))


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
    codes = launch(plan.config, plan.flags, script, output / "logs", plan.processes, plan.nodes, plan.needs_gpu)
    said = "\n".join(log.read_text(encoding="utf-8") for log in sorted((output / "logs").glob("*.log")))
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("rank-*.json"))]
    record = output / plan.tasks[0] / "result.json"
    whole = not any(codes) and len(ranks) == plan.processes and record.is_file()
    if not whole or read_result(record).environment["world_size"] != plan.processes:
        return {"starts": 0.0, "said": why(said)}
    return {"starts": 1.0, "adapter": record.parent / "adapter", "environment": read_result(record).environment,
            "seconds": read_result(record).seconds, **steps_of(ranks)}  # fmt: skip


def why(said: str) -> str:
    """Why a launch failed: its processes' sentences, which the launcher's own lines follow, or what was said last."""
    sentences = [line for line in said.splitlines() if line.startswith("error: ")]
    return "\n".join(dict.fromkeys(sentences)) or said[-2000:]


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


def differences(adapter: Path, reference: Path) -> dict[str, float]:
    """Distances of Delta W to the reference's, relative to its norm: of all modules together, and the largest one's."""
    ours, theirs = load_adapter_weights(adapter).factors, load_adapter_weights(reference).factors
    if ours.keys() != theirs.keys():
        return {"difference": float("inf"), "largest_difference": float("inf")}
    pairs = [(ours[name].delta_weight(), theirs[name].delta_weight()) for name in theirs]
    apart, norms = [float((a - b).norm()) for a, b in pairs], [float(b.norm()) for _, b in pairs]
    return {
        "difference": math.hypot(*apart) / math.hypot(*norms),
        "largest_difference": max(a / norm for a, norm in zip(apart, norms, strict=True)),
    }


def left_out(plan: BackendPlan) -> str | None:
    """Why an entry cannot run here; None: it can."""
    if plan.needs_gpu and (there := torch.cuda.device_count()) < plan.processes:
        return f"it needs {plan.processes} GPUs, and there are {there}"
    return multi_node.why_not() if plan.nodes > 1 else None


def record_of(
    name: str, plan: BackendPlan, config: RunConfig, seen: dict[str, Any], reference: dict[str, Any]
) -> Result:
    """The record of a measured run, next to its reference's measurements."""
    metrics = {key: value for key, value in seen.items() if isinstance(value, float | int)}
    seconds = metrics.pop("seconds", 0.0)
    if seen["starts"]:
        metrics |= differences(seen["adapter"], reference["adapter"])
    # Between GPUs bytes pass no network interface; where a run has no network of its own, others' are counted too.
    if plan.needs_gpu or multi_node.why_not() is not None:
        metrics.pop("bytes_per_step", None)
    settings = config.flat() | {"model_name_or_path": plan.model, "output_dir": None, "data_root": None}
    launched = {"backend": name, "label": plan.label, "launch_config": plan.config, "launch_flags": plan.flags,
                "processes": plan.processes, "nodes": plan.nodes, "reference": plan.reference}  # fmt: skip
    return Result("backends", settings | launched, metrics, seconds, int(metrics.get("peak_memory_bytes", 0)),
                  config.train.max_steps, config.train.max_steps * plan.batch,
                  {} if seen["starts"] else {"said": seen["said"]},
                  seen.get("environment", {}) | {"base_model": plan.model})  # fmt: skip


def run(
    chosen: dict[str, BackendPlan], plans: dict[str, BackendPlan], data_root: str | None, work: Path
) -> Iterator[Result]:
    """The records of the chosen entries, method by method.

    Args:
        chosen: by name.
        plans: all entries, for those that the chosen ones are compared to.
        data_root: of MTL15.
        work: folder for adapters and logs.

    Raises:
        InputError: if a reference does not run.
    """
    measured: dict[tuple[str, str], dict[str, Any]] = {}

    def done(name: str, method: str) -> tuple[RunConfig, dict[str, Any]]:
        plan = plans[name]
        model = work / "models" / Path(plan.model).name
        if not model.is_dir():
            without_dropout(plan.model, model)
        config = plan.run_config(method, model, data_root, work / name / method)
        if (name, method) not in measured:
            measured[name, method] = measure(plan, config)
        return config, measured[name, method]

    for method in dict.fromkeys(method for plan in chosen.values() for method in plan.methods):
        for name, plan in chosen.items():
            if method not in plan.methods:
                continue
            if (reason := left_out(plan)) is not None:
                say(f"{name}, {method}: left out: {reason}")
                continue
            _, reference = done(plan.reference, method)
            if not reference["starts"]:
                raise InputError(
                    f"{plan.reference} of the plan does not run; see {work / plan.reference / method}/logs"
                )
            config, seen = done(name, method)
            yield record_of(name, plan, config, seen, reference)


@exit_on_input_error
def main() -> None:
    parser = protocol_parser(__doc__, HERE, entries="backends")
    add_folder(parser, "--work", "runs/backends", "adapters and logs")
    args = parser.parse_args()
    plans, chosen = read_plans(args.plan, BackendPlan), dict(chosen_plans(args, BackendPlan))
    for result in run(chosen, plans, args.data_root, args.work.resolve()):
        name, method = result.config["backend"], result.config["method"]
        write_result(args.results / f"{name}-{method}.json", result)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in result.metrics.items())
        say(f"{name}, {method}: {shown}")


if __name__ == "__main__":
    sys.exit(main())
