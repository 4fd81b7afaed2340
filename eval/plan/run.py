"""Is what `copra plan` says so? Predicted against measured, on this machine's CPU.

    python eval/plan/run.py [--models minilm smollm2]       (needs $COPRA_DATA with mtl15/imdb and instruct/alpaca)
    python eval/plan/run.py --keep_measured                 (the plan has changed, what it is held against has not)

Every run is a process of its own with one thread: the peak of its resident memory above what it was before the model
was loaded, what of it stays between steps, parameters, files, and the user-mode CPU seconds of its steps after the
first (the machine may be shared).
The C library is told to give large blocks back when they are freed (MALLOC_MMAP_THRESHOLD_), since it otherwise keeps
them, and resident memory would say how it fills its heap. Rows are full: texts longer than --max_length, conversations
packed.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import yaml

from copra_llm.errors import InputError, exit_on_input_error
from copra_llm.protocols.alone import alone
from copra_llm.results import Result, environment, read_result, write_result

HERE = Path(__file__).parent


def settings(plan: dict, model: str, name: str) -> dict:
    """One run's settings, by the flags' names."""
    own = plan["common"] | {"model_name_or_path": model} | plan[model]["runs"][name]
    data = Path(os.environ.get("COPRA_DATA", HERE.parents[1] / "data"))
    if "task" in plan[model]:
        return own | {"tasks": [plan[model]["task"]], "data_root": str(data / "mtl15"), "max_train_samples": 400}
    path = data / "instruct" / plan[model]["conversations"] / "train.jsonl"
    if not path.is_file():
        raise InputError(f"{path} is not there; set COPRA_DATA to the folder that holds instruct")
    lines = path.read_text(encoding="utf-8").splitlines()[:400]
    few = Path(tempfile.gettempdir()) / f"plan-{os.getpid()}.jsonl"
    few.write_text("\n".join(lines), encoding="utf-8")
    return own | {"dataset_name": [str(few)], "eval_dataset_name": [str(few)], "tasks": ["instruct"], "packing": True}


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most since the count was last cleared (Linux)."""
    key = "VmHWM" if peak else "VmRSS"
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def out_of_the_file(model) -> None:
    """Copy weights that are views of the file that they were read from, which lets go of it.

    As long as one is, the pages of all that were ever read count as resident, those too of weights that were quantised
    on the way. The system can take them back at any time: they are no need of the run.
    """
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.clone()


def measured(values: dict) -> dict:
    """Train, in this process."""
    from accelerate import Accelerator

    import copra_llm.train as train
    from copra_llm.activations import checkpoint_activations
    from copra_llm.build import build
    from copra_llm.config import RunConfig

    config = RunConfig().replace(**values)
    Accelerator()
    before = resident()
    bench = build(config, config.data.tasks, splits=("train",))
    if config.train.gradient_checkpointing:
        checkpoint_activations(bench.base.model)
    out_of_the_file(bench.classifier)
    lengths = [len(row) for split in bench.splits["train"].values() for row in split.encoded]
    marks: list[tuple[float, int]] = []
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: loading reads files, which training does not

    def mark() -> None:
        marks.append((resource.getrusage(resource.RUSAGE_SELF).ru_utime, resident()))

    folder = Path(config.train.output_dir)
    train.fit(Accelerator(), bench, config, folder, mark)
    peak = resident(peak=True)
    checkpoint = folder / f"checkpoint-{config.train.max_steps}"
    return {
        "trained_parameters": sum(p.numel() for p in bench.classifier.parameters() if p.requires_grad),
        "adapter_file_bytes": (checkpoint / "adapter_model.safetensors").stat().st_size,
        "checkpoint_bytes": sum(f.stat().st_size for f in checkpoint.iterdir()),
        "memory": peak - before,
        "between_steps": marks[-1][1] - before,
        "step_seconds": statistics.median(b[0] - a[0] for a, b in zip(marks, marks[1:], strict=False)),
        "rows": len(lengths),
    }


def predicted(values: dict) -> dict:
    """What the plan says."""
    from copra_llm.config import RunConfig
    from copra_llm.plan.cluster import ClusterSettings
    from copra_llm.plan.estimate import make_plan

    plan = make_plan(RunConfig().replace(**values), ClusterSettings(device="cpu", packing=values.get("packing", False)))
    (backend,) = plan.backends
    return {
        "trained_parameters": plan.sizes.trained_params,
        "adapter_file_bytes": plan.sizes.adapter_file,
        "checkpoint_bytes": plan.checkpoint,
        "memory": backend.memory.total,
        "between_steps": backend.memory.between_steps,
        "flops": backend.flops,
    }


def in_a_process(what: str, values: dict) -> dict:
    """`measured` or `predicted`, alone in a process."""
    return alone(Path(__file__), ["--worker", what, "--values", json.dumps(values)], give_back=True)


def check(plan: dict, model: str, file: Path) -> None:
    """All runs of a model; the record is written after each, so what is done stays."""
    started, metrics, done = time.time(), {}, {}
    for name in plan[model]["runs"]:
        values = settings(plan, model, name)
        with tempfile.TemporaryDirectory() as folder:
            found = in_a_process("measured", values | {"output_dir": folder})
        done[name] = plan[model]["runs"][name]
        metrics |= {f"{name}/measured/{key}": value for key, value in found.items()}
        metrics |= compared(metrics, done, name, values)
        config = {"model_name_or_path": model, **plan["common"], "runs": done}
        record = Result("plan_check", config, metrics, time.time() - started, steps=plan["common"]["max_steps"],
                        environment=environment(threads=1))  # fmt: skip
        write_result(file, record)


def predict_again(plan: dict, model: str, file: Path) -> None:
    """What a record has measured beside what the plan says now."""
    if not file.is_file():
        raise InputError(f"{file} is not there, so nothing was measured; leave --keep_measured out")
    record = read_result(file)
    metrics = {key: value for key, value in record.metrics.items() if "/measured/" in key}
    for name in record.config["runs"]:
        metrics |= compared(metrics, record.config["runs"], name, settings(plan, model, name))
    write_result(file, replace(record, metrics=metrics))


def compared(metrics: dict, runs: dict, name: str, values: dict) -> dict:
    """What the plan says of a run, the time at the speed that the first of `runs` has shown."""
    said, first = in_a_process("predicted", values), next(iter(runs))
    flops = said["flops"] if name == first else metrics[f"{first}/predicted/flops"]
    said["step_seconds"] = said["flops"] / flops * metrics[f"{first}/measured/step_seconds"]
    for few in values.get("dataset_name", []):
        Path(few).unlink(missing_ok=True)
    for key in ("memory", "step_seconds"):
        print(f"{name}: {key} {said[key]:.4g} said, {metrics[f'{name}/measured/{key}']:.4g} found", flush=True)
    return {f"{name}/predicted/{key}": value for key, value in said.items()}


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm", "smollm2"])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--keep_measured", action="store_true", help="predict anew what the records have measured")
    parser.add_argument("--worker", choices=("measured", "predicted"), help=argparse.SUPPRESS)
    parser.add_argument("--values", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps({"measured": measured, "predicted": predicted}[args.worker](args.values)))
        return
    plan = yaml.safe_load((HERE / "plan.yaml").read_text(encoding="utf-8"))
    for model in args.models:
        file = args.results / f"{model}.json"
        if args.keep_measured:
            predict_again(plan, model, file)
        else:
            check(plan, model, file)


if __name__ == "__main__":
    sys.exit(main())
