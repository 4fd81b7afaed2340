"""When does `--torch_compile` pay?

    python eval/speed/compile.py [--rounds 3] [--steps 8]      # needs a C++ compiler

CopRA's whole schedule in every round, here with the transformer blocks compiled and as they are, on the same batches;
rounds are interleaved. CPU seconds of one thread, since the machine may be shared; those of the C++ compiler count.
What compiling takes is what the first compiled round costs beyond a later one, from an empty cache. Each model and
precision is a process of its own.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.protocols.alone import alone
from copra_llm.results import Result, write_result

RECORD = Path(__file__).parent / "results" / "compile.json"
SHAPES = {"smollm2": (4, 128), "minilm": (16, 64)}
"""Examples a step, and tokens of each (BoolQ's are longer, and cut)."""
PRECISIONS = ("float32", "bfloat16")


def cpu_seconds() -> float:
    """Of this process, and of the compilers that it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def measure(model: str, precision: str, rounds: int, steps: int) -> dict:
    """Seconds a step of each round, and those that compiling took; in a process of its own."""
    import torch
    from accelerate import Accelerator

    from copra_llm.build import build
    from copra_llm.config import RunConfig
    from copra_llm.train import fit, run_environment

    torch.set_num_threads(1)
    examples, length = SHAPES[model]
    config = RunConfig().replace(
        model_name_or_path=model, tasks=["boolq"], data_root="sample", max_length=length, max_steps=steps,
        max_eval_samples=1, checkpoint_at=[], per_device_train_batch_size=examples, bf16=precision == "bfloat16",
    )  # fmt: skip
    bench = build(config, ["boolq"])
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision)

    def seconds_per_step(compiled: bool) -> float:
        with tempfile.TemporaryDirectory() as folder:
            started = cpu_seconds()
            fit(accelerator, bench, config.replace(torch_compile=compiled), Path(folder))
            return (cpu_seconds() - started) / steps

    seconds_per_step(False)  # warms up, and does not count
    first = seconds_per_step(True)
    times = {"plain": [], "compiled": []}
    for _ in range(rounds):
        times["plain"].append(seconds_per_step(False))
        times["compiled"].append(seconds_per_step(True))
    compiling = steps * (first - statistics.median(times["compiled"]))
    about = run_environment(accelerator, bench)
    return {"times": times, "compiling": compiling, "config": config.flat(), "environment": about}


def in_a_process(model: str, precision: str, rounds: int, steps: int) -> dict:
    """`measure` with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        asked = ["--worker", model, precision, "--rounds", str(rounds), "--steps", str(steps)]
        return alone(Path(__file__), asked)


def figures(case: str, found: dict) -> dict[str, float]:
    """What the record says of a model and precision."""
    plain, compiled = (found["times"][name] for name in ("plain", "compiled"))
    medians = statistics.median(plain), statistics.median(compiled)
    ratios = [a / b for a, b in zip(compiled, plain, strict=True)]
    return {
        f"seconds_per_step/{case}/plain": medians[0], f"seconds_per_step/{case}/compiled": medians[1],
        f"ratio/{case}": medians[1] / medians[0], f"ratio_min/{case}": min(ratios), f"ratio_max/{case}": max(ratios),
        f"compile_seconds/{case}": found["compiling"],
    }  # fmt: skip


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--results", type=Path, default=RECORD)
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(*args.worker, args.rounds, args.steps)))
        return
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    metrics, times, seconds = {}, {}, 0.0
    for model in args.models:
        for precision in PRECISIONS:
            case = f"{model}/{precision}"
            found = in_a_process(model, precision, args.rounds, args.steps)
            times[case], metrics = found["times"], metrics | figures(case, found)
            seconds += args.steps * sum(map(sum, found["times"].values()))
            print(f"{case}: {metrics[f'ratio/{case}']:.2f} x the time of a step, {found['compiling']:.0f} s to compile",
                  flush=True)  # fmt: skip
            config = found["config"] | {"output_dir": None, "rounds": args.rounds, "models": args.models}
            record = Result("speed_compile", config, metrics, seconds, steps=args.steps,
                            data={"times": times}, environment=found["environment"])  # fmt: skip
            write_result(args.results, record)


if __name__ == "__main__":
    sys.exit(main())
