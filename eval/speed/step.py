"""What does a training step cost: the frozen base, PEFT, the trainers people use, this package's LoRA and CopRA?

    python eval/speed/step.py [--models smollm2 minilm clip] [--precisions float32 bfloat16] [--device auto]
                              [--rounds 5] [--steps N] [--threads 1] [--again]

One record a model, precision and device, in results/step-<model>-<precision>-<device>.json; what has a record is not
measured again (`--again`: it is). Who takes part is in `contenders.py`, on what in `workloads.py`, what is counted in
`watches.py`; the README says what was chosen, and why. At the end the tables of all records are printed, the goals
among them. Needs trl for its SFTTrainer.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from random_clip import ABOUT

from copra_llm.errors import InputError, exit_on_input_error
from copra_llm.figures.steps import PROTOCOL, step_metrics
from copra_llm.protocols.alone import alone
from copra_llm.report import find_results, step_table
from copra_llm.results import Result, environment, write_result
from copra_llm.summaries.speed import goals_table, step_counts_table

HERE = Path(__file__).parent
MODELS = ("smollm2", "minilm", "clip")
PRECISIONS = ("float32", "bfloat16")
STEPS = {"cpu": {"smollm2": 4, "minilm": 12, "clip": 12}, "cuda": dict.fromkeys(MODELS, 24)}
"""Steps of CopRA's schedule in a round: one of SmolLM2 takes seconds on a core."""


# --- workers ----------------------------------------------------------------------------------------------


def workload(args: argparse.Namespace, folder: Path):
    """Model and data, on the device."""
    import workloads

    torch.set_num_threads(args.threads)
    if args.model == "clip":
        made = workloads.dual(folder, args.precision)
    else:
        made = workloads.of_texts(args.model, args.precision)
    made.peft.to(args.device)
    made.bare.to(args.device)
    return made


def work(args: argparse.Namespace) -> None:
    """What a worker answers, as its last line."""
    from rounds import peak_bytes, timed

    with tempfile.TemporaryDirectory() as folder:
        w = workload(args, Path(folder))
        if args.worker == "times":
            answer = timed(w, args.device, args.rounds, args.steps, lambda line: print(line, flush=True))
            answer["base"] = w.base.about() | ({"base_model": ABOUT} if args.model == "clip" else {})
        else:
            answer = peak_bytes(w, args.device, args.worker)
    print(json.dumps(answer))


# --- records ----------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, model: str, precision: str, device: str) -> Result:
    """One record: times and counts of one process, memory of one for each contender."""
    from rounds import remembered

    started, steps = time.time(), args.steps or STEPS[device][model]
    own = ["--model", model, "--precision", precision, "--device", device, "--rounds", str(args.rounds),
           "--steps", str(steps), "--threads", str(args.threads)]  # fmt: skip
    script = Path(__file__).resolve()
    found = alone(script, ["--worker", "times", *own], args.threads, say=lambda line: print(line, flush=True))
    peaks = {
        name: alone(script, ["--worker", name, *own], args.threads, give_back=True)
        for name in remembered(found["seconds"])
    }
    metrics = step_metrics(found["seconds"], found["whole"], "gpu" if device == "cuda" else "cpu")
    for name, counts in found["counts"].items():
        metrics |= {f"{key}/{name}": value for key, value in counts.items()}
    for name in ("truncated", "copra"):
        metrics[f"ratio/saved/{name}/peft"] = metrics[f"saved_bytes/{name}"] / metrics["saved_bytes/peft"]
    metrics |= {f"peak_bytes/{name}": float(peak) for name, peak in peaks.items()}
    about = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "processor": processor(),
             "threads": args.threads, **found["base"]}  # fmt: skip
    if "sft" in peaks:
        about["trl"] = version("trl")
    config = {"model": model, "precision": precision, "device": device, "rounds": args.rounds, "steps": steps}
    data = {key: found[key] for key in ("seconds", "whole", "first_loss")}
    return Result(PROTOCOL, config, metrics, time.time() - started, max(peaks.values()), steps, data=data,
                  environment=environment(**about))  # fmt: skip


def processor() -> str:
    """The CPU's name, where the system tells it (Linux)."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def devices(wanted: str) -> list[str]:
    """Those to measure on.

    Raises:
        InputError: if a GPU is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but there is no GPU here; use --device cpu")
    return ["cpu", *["cuda"] * torch.cuda.is_available()] if wanted == "auto" else [wanted]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of CopRA's schedule in a round; by default as the model is large")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--again", action="store_true", help="measure what has a record too")
    for hidden in ("--worker", "--model", "--precision"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("rounds", "steps", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name} is {value}, but must be at least 1")
    return args


@exit_on_input_error
def main() -> None:
    args = arguments()
    if args.worker:
        return work(args)
    if "smollm2" in args.models and find_spec("trl") is None:
        raise InputError("trl is not installed, whose SFTTrainer takes part; pip install 'copra_llm[trl]'")
    # Of several GPUs Trainer would take all.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    for model in args.models:
        for precision in args.precisions:
            for device in devices(args.device):
                file = args.results / f"step-{model}-{precision}-{device}.json"
                if file.is_file() and not args.again:
                    print(f"{file.name}: measured before (--again measures it anew)")
                    continue
                print(f"{file.name}: {args.rounds} rounds", flush=True)
                write_result(file, measure(args, model, precision, device))
    records = find_results([args.results])
    print(*(table(records) for table in (goals_table, step_table, step_counts_table)), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
