"""When does `--torch_compile` pay, and what does CopRA's step cost with it, beside PEFT's and the frozen base's?

    python eval/speed/compile.py [--rounds 5] [--steps 8] [--again]      # needs a C++ compiler

Models, batches, contenders and masks are those of `step.py`: PEFT LoRA in the bare loop, the frozen base truncated as
CopRA, this loop with CopRA as it is and with the transformer blocks compiled, in interleaved rounds over the whole
schedule. CPU seconds of one thread, since the machine may be shared; those of the C++ compiler count. What compiling
takes is what the first compiled round costs beyond a later one, from an empty cache. Each model and precision is a
process of its own; what the record has is not measured again.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.figures.steps import COMPILED_PAIRS, paired_ratio
from copra_llm.protocols.alone import alone
from copra_llm.results import Result, environment, read_result, write_result

RECORD = Path(__file__).parent / "results" / "compile.json"
MODELS, PRECISIONS = ("smollm2", "minilm"), ("float32", "bfloat16")


def cpu_seconds() -> float:
    """Of this process, and of the compilers that it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def measure(model: str, precision: str, rounds: int, steps: int) -> dict:
    """Seconds a step of each contender and round, and those that compiling took; in a process of its own."""
    import torch
    from contenders import CONTENDERS, fitted, twin
    from sampling import sampled_schedule, seeds_like_a_long_run
    from watches import Clock
    from workloads import of_texts

    torch.set_num_threads(1)
    w = of_texts(model, precision)
    # One model for all rounds: graphs are those of its blocks.
    own = twin(w.peft)
    schedule = {"method": "copra", **sampled_schedule(steps)}

    def seconds(name: str, seed: int) -> float:
        took = max(1, steps // 4) if name == "peft" else steps
        clock = Clock(took)
        if name in CONTENDERS:
            CONTENDERS[name](w, "cpu", w.full, took, seed, clock)
        else:
            compiled = name == "compiled"
            fitted(w, own, "cpu", w.full, took, clock, **schedule, mask_seed=seed, torch_compile=compiled)
        return clock.seconds["cpu"] / took

    seeds = seeds_like_a_long_run(w, steps, rounds)
    names = ("peft", "truncated", "plain", "compiled")
    for name in names[:-1]:  # warms up, and does not count
        seconds(name, seeds[0])
    started = cpu_seconds()
    seconds("compiled", seeds[0])
    first = cpu_seconds() - started
    times = {name: [] for name in names}
    for _, seed in zip(range(rounds), itertools.cycle(seeds), strict=False):
        for name in names:
            times[name].append(seconds(name, seed))
    compiling = first - steps * statistics.median(times["compiled"])
    return {"times": times, "compiling": compiling, "environment": w.base.about()}


def in_a_process(model: str, precision: str, rounds: int, steps: int) -> dict:
    """`measure` with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        asked = ["--worker", model, precision, "--rounds", str(rounds), "--steps", str(steps)]
        return alone(Path(__file__), asked)


def figures(case: str, found: dict) -> dict[str, float]:
    """What the record says of a model and precision."""
    metrics = {f"seconds_per_step/{case}/{name}": statistics.median(own) for name, own in found["times"].items()}
    for pair in COMPILED_PAIRS:
        first, second = pair.split("/")
        ratio = paired_ratio(found["times"][first], found["times"][second])
        metrics |= {f"ratio/{case}/{pair}": ratio.mean, f"ratio_min/{case}/{pair}": ratio.low,
                    f"ratio_max/{case}/{pair}": ratio.high}  # fmt: skip
    return metrics | {f"compile_seconds/{case}": found["compiling"]}


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--results", type=Path, default=RECORD)
    parser.add_argument("--again", action="store_true", help="measure what the record has too")
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(*args.worker, args.rounds, args.steps)))
        return
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    config = {"rounds": args.rounds, "steps": args.steps}
    metrics, times, seconds = {}, {}, 0.0
    if args.results.is_file() and (before := read_result(args.results)).config == config:
        metrics, times, seconds = before.metrics, before.data["times"], before.seconds
    for model, precision in itertools.product(args.models, args.precisions):
        case = f"{model}/{precision}"
        if case in times and not args.again:
            print(f"{case}: measured before (--again measures it anew)")
            continue
        found = in_a_process(model, precision, args.rounds, args.steps)
        times[case], metrics = found["times"], metrics | figures(case, found)
        seconds += args.steps * sum(map(sum, found["times"].values())) + found["compiling"]
        print(f"{case}: {metrics[f'ratio/{case}/compiled/plain']:.2f} x the time of a step, "
              f"{found['compiling']:.0f} s to compile", flush=True)  # fmt: skip
        record = Result("speed_compile", config, metrics, seconds, steps=args.steps, data={"times": times},
                        environment=environment(**found["environment"]))  # fmt: skip
        write_result(args.results, record)


if __name__ == "__main__":
    sys.exit(main())
