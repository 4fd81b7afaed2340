"""Where does a step's time go: products, attention, passes over activations, the optimizer, or Python?

    python eval/speed/kernels.py [--models smollm2] [--precisions float32] [--rounds 3] [--steps 8]

The frozen base, this loop's LoRA, the truncated base and this loop's CopRA of `step.py`, on the same batches and masks,
under torch's profiler: of each operation the CPU time of itself, without those that it calls. What lies between
operations (Python, dispatch, autograd's bookkeeping; the profiler's own cost too) is *between*. Interleaved rounds in
one process, one thread; medians.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

from copra_llm.errors import exit_on_input_error
from copra_llm.figures.steps import PROFILED
from copra_llm.protocols.alone import alone
from copra_llm.results import Result, environment, write_result

RESULTS = Path(__file__).parent / "results"
MODELS, PRECISIONS = ("smollm2", "minilm"), ("float32", "bfloat16")
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::matmul"),
    "attention": ("scaled_dot_product", "flash_attention", "softmax"),
    "optimizer, clipping": ("adamw", "foreach", "linalg_vector_norm", "Optimizer"),
    "copies and casts": ("aten::copy_", "aten::clone", "aten::cat", "aten::_to_copy", "aten::contiguous"),
}
"""Parts of the operations' names; the first kind that fits counts. Products are named whole."""
OTHER, BETWEEN = "other operations", "between operations"


def kind_of(operation: str) -> str:
    """The kind of work that an operation's name stands for."""
    for kind, parts in KINDS.items():
        if any(operation == part if part.startswith("aten::") else part in operation for part in parts):
            return kind
    return OTHER


def milliseconds(w, name: str, steps: int, seed: int) -> dict[str, float]:
    """Of a step, by kind of work."""
    from contenders import CONTENDERS
    from torch.profiler import ProfilerActivity, profile
    from watches import Clock

    clock = Clock(steps)
    profiler = profile(activities=[ProfilerActivity.CPU])

    class Watch:
        """Profiles what the clock times."""

        def begin(self) -> None:
            if clock._began is None:
                profiler.__enter__()
            clock.begin()

        def step(self) -> None:
            clock.step()
            if clock.left == 0:
                profiler.__exit__(None, None, None)

    CONTENDERS[name](w, "cpu", w.full, steps, seed, Watch())
    found = dict.fromkeys([*KINDS, OTHER, BETWEEN], 0.0)
    for event in profiler.key_averages():
        # Python's own autograd nodes and the profiler's marks are no kernels: their self time is Python's.
        if event.key.startswith("aten::") or event.key.startswith("torch::"):
            found[kind_of(event.key)] += event.self_cpu_time_total / 1000.0 / steps
    found[BETWEEN] = 1000.0 * clock.seconds["wall"] / steps - sum(found.values())
    return found


def measure(model: str, precision: str, rounds: int, steps: int) -> dict:
    """Medians over rounds for each contender and kind; in a process of its own."""
    import torch
    from sampling import seeds_like_a_long_run
    from workloads import of_texts

    torch.set_num_threads(1)
    w = of_texts(model, precision)
    seeds = seeds_like_a_long_run(w, steps, rounds)
    for name in PROFILED:  # warms up, and does not count
        milliseconds(w, name, 1, seeds[0])
    found = [{name: milliseconds(w, name, steps, seed) for name in PROFILED} for seed in seeds]
    medians = {name: {kind: statistics.median(one[name][kind] for one in found) for kind in found[0][name]}
               for name in PROFILED}  # fmt: skip
    return {"milliseconds": medians, "environment": w.base.about()}


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(*args.worker, args.rounds, args.steps)))
        return
    for model, precision in itertools.product(args.models, args.precisions):
        asked = ["--worker", model, precision, "--rounds", str(args.rounds), "--steps", str(args.steps)]
        found = alone(Path(__file__), asked)
        config = {"model": model, "precision": precision, "rounds": args.rounds, "steps": args.steps}
        record = Result("speed_profile", config, {}, data={"milliseconds": found["milliseconds"]},
                        environment=environment(**found["environment"]))  # fmt: skip
        write_result(RESULTS / f"kernels-{model}-{precision}.json", record)


if __name__ == "__main__":
    sys.exit(main())
