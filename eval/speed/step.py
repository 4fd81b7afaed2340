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
import math
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from copra_llm.errors import InputError, exit_on_input_error
from copra_llm.figures.steps import PROTOCOL, step_metrics
from copra_llm.protocols.alone import alone
from copra_llm.report import find_results, step_table
from copra_llm.results import Result, environment, peak_memory_bytes, write_result
from copra_llm.summaries.speed import goals_table, step_counts_table

HERE = Path(__file__).parent
MODELS = ("smollm2", "minilm", "clip")
PRECISIONS = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far first losses may be apart, relatively: sums in another order, and 8 bits of a number."""
STEPS = {"cpu": {"smollm2": 4, "minilm": 12, "clip": 12}, "cuda": dict.fromkeys(MODELS, 24)}
"""Steps of CopRA's schedule in a round: one of SmolLM2 takes seconds on a core."""
COUNTED = 8
"""Steps of the schedule over which operations and bytes are counted."""
WHOLE = ("trainer", "copra")
"""Who trains on texts of their own lengths."""


# --- workers ----------------------------------------------------------------------------------------------


def workload(args: argparse.Namespace, folder: Path):
    """Model and data, on the device."""
    import workloads

    torch.set_num_threads(args.threads)
    makers = {
        "smollm2": lambda: workloads.language("smollm2", args.precision),
        "minilm": lambda: workloads.encoder("minilm", args.precision),
        "clip": lambda: workloads.dual(folder, args.precision),
    }
    made = makers[args.model]()
    made.peft.to(args.device)
    made.bare.to(args.device)
    return made


def timed(w, device: str, rounds: int, steps: int, tolerance: float) -> dict:
    """First losses, counts, and seconds of each contender in every round."""
    from contenders import CONTENDERS, SCHEDULED, contenders_of
    from watches import Clock, Counter
    from workloads import NATURAL_STEPS, without_dropout

    names = contenders_of(w)
    took = {name: steps if name in SCHEDULED else max(1, steps // 4) for name in names}

    def seconds_of(name: str, split, n: int, seed: int) -> tuple[dict, float]:
        clock = Clock(n, device)
        loss = CONTENDERS[name](w, device, split, n, seed, clock)
        return clock.seconds, loss

    with without_dropout(w):
        warm = {name: seconds_of(name, w.full, 1, 0) for name in names}
    losses = {name: loss for name, (_, loss) in warm.items()}
    if not all(math.isclose(loss, losses["base"], rel_tol=tolerance) for loss in losses.values()):
        raise AssertionError(f"the contenders do not train the same: {losses}")
    whole_units = NATURAL_STEPS * len(WHOLE) if w.natural else 0
    one = {name: found["wall"] for name, (found, _) in warm.items()}
    expected = rounds * (sum(took[name] * one[name] for name in names) + whole_units * one["copra"])
    expected += COUNTED * sum(one[name] for name in SCHEDULED)
    print(f"about {expected / 60:.1f} minutes", flush=True)

    counts, seconds, whole = {}, {name: [] for name in names}, {name: [] for name in WHOLE if w.natural}
    for name in names:
        n = COUNTED if name in SCHEDULED else 1
        with Counter([w.peft, w.bare]) as counter:
            CONTENDERS[name](w, device, w.full, n, 0, counter)
        counts[name] = vars(counter.mean())
    for round_ in range(rounds):
        for name in names:
            found, _ = seconds_of(name, w.full, took[name], round_)
            seconds[name].append({clock: value / took[name] for clock, value in found.items()})
        for name in whole:
            whole[name].append(seconds_of(name, w.natural, NATURAL_STEPS, round_)[0])
    return {"contenders": names, "first_loss": losses, "counts": counts,
            "seconds": by_clock(seconds), "whole": by_clock(whole)}  # fmt: skip


def by_clock(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """`{contender: {clock: seconds in each round}}`."""
    return {name: {clock: [r[clock] for r in found] for clock in found[0]} for name, found in rounds.items()}


def remembered(w, device: str, name: str) -> int:
    """Peak memory in bytes of one contender, which has this process to itself."""
    from contenders import CONTENDERS, SCHEDULED
    from watches import Clock

    # Of a schedule sampled at four places the last one has all layers active.
    steps = 4 if name in SCHEDULED else 2
    CONTENDERS[name](w, device, w.full, steps, 0, Clock(steps, device))
    return peak_memory_bytes()


def work(args: argparse.Namespace) -> None:
    """What a worker answers, as its last line."""
    with tempfile.TemporaryDirectory() as folder:
        w = workload(args, Path(folder))
        if args.worker == "times":
            answer = timed(w, args.device, args.rounds, args.steps, PRECISIONS[args.precision])
            answer["base"] = w.base.about() | ({"base_model": "random CLIP"} if args.model == "clip" else {})
        else:
            answer = remembered(w, args.device, args.worker)
    print(json.dumps(answer))


# --- records ----------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, model: str, precision: str, device: str) -> Result:
    """One record: times and counts of one process, memory of one for each contender."""
    started, steps = time.time(), args.steps or STEPS[device][model]
    own = ["--model", model, "--precision", precision, "--device", device, "--rounds", str(args.rounds),
           "--steps", str(steps), "--threads", str(args.threads)]  # fmt: skip
    script = Path(__file__).resolve()
    found = alone(script, ["--worker", "times", *own], args.threads, say=lambda line: print(line, flush=True))
    peaks = {name: alone(script, ["--worker", name, *own], args.threads, give_back=True)
             for name in found["contenders"] if name != "truncated"}  # fmt: skip
    metrics = step_metrics(found["seconds"], found["whole"], "gpu" if device == "cuda" else "cpu")
    for name, counts in found["counts"].items():
        metrics |= {f"{key}/{name}": value for key, value in counts.items()}
    metrics["ratio/saved/copra/peft"] = metrics["saved_bytes/copra"] / metrics["saved_bytes/peft"]
    metrics |= {f"peak_bytes/{name}": float(peak) for name, peak in peaks.items()}
    about = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "processor": processor(),
             "threads": args.threads, "trl": version("trl"), **found["base"]}  # fmt: skip
    config = {"model": model, "precision": precision, "device": device, "rounds": args.rounds, "steps": steps,
              "counted_steps": COUNTED}  # fmt: skip
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
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
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
    if find_spec("trl") is None:
        raise InputError("trl is not installed, whose SFTTrainer takes part; pip install 'copra_llm[trl]'")
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
