"""What does a step cost: this loop's LoRA and CopRA against plain PEFT in a bare loop?

    python eval/step_time/run.py [--models minilm smollm2] [--rounds 5] [--steps 20]

One process with one thread, the same batches, interleaved rounds; CPU seconds, since the machine may be shared. CopRA
runs its whole schedule in every round, so its figure is the mean over the run and not that of one p. Ratios are of
medians; the spread stands beside them.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from copra_llm.batches import BatchStream, train_loader
from copra_llm.build import build
from copra_llm.config import RunConfig
from copra_llm.errors import exit_on_input_error
from copra_llm.results import Result, write_result
from copra_llm.train import fit, run_environment

HERE = Path(__file__).parent


def bare_peft(bench, config: RunConfig) -> float:
    """CPU seconds of `max_steps` steps of the loop anybody would write around a PEFT model."""
    splits, settings = list(bench.splits["train"].values()), config.train
    stream = BatchStream(splits, settings.per_device_train_batch_size, 0, 0, settings.max_steps)
    trained = [p for p in bench.classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    bench.classifier.train()
    started = time.process_time()
    for batch in train_loader(bench.classifier, splits, stream):
        bench.classifier(batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - started


def this_loop(bench, config: RunConfig) -> float:
    """CPU seconds of `copra_llm.train.fit` over the whole schedule."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        fit(Accelerator(), bench, config, Path(folder))
        return time.process_time() - started


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm", "smollm2"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in args.models:
        base = RunConfig().replace(
            model_name_or_path=model, tasks=["agnews"], data_root="sample", max_length=64, max_steps=args.steps,
            max_eval_samples=1, checkpoint_at=[], per_device_train_batch_size=16 if model == "minilm" else 4,
        )  # fmt: skip
        bench = build(base, ["agnews"])
        loops = {
            "bare PEFT": lambda bench=bench, base=base: bare_peft(bench, base),
            "LoRA": lambda bench=bench, base=base: this_loop(bench, base.replace(method="lora")),
            "CopRA": lambda bench=bench, base=base: this_loop(bench, base.replace(method="copra")),
        }
        times: dict[str, list[float]] = {name: [] for name in loops}
        for round_ in range(args.rounds + 1):  # the first one warms up and does not count
            for name, loop in loops.items():
                seconds = loop() / args.steps
                if round_ > 0:
                    times[name].append(seconds)
        medians = {name: statistics.median(values) for name, values in times.items()}
        metrics = {f"seconds_per_step/{name}": median for name, median in medians.items()}
        for name in ("LoRA", "CopRA"):
            ratios = [a / b for a, b in zip(times[name], times["bare PEFT"], strict=True)]
            metrics |= {f"ratio/{name}": medians[name] / medians["bare PEFT"],
                        f"ratio_min/{name}": min(ratios), f"ratio_max/{name}": max(ratios)}  # fmt: skip
            print(f"{model}: {name} / bare PEFT = {metrics[f'ratio/{name}']:.2f} "
                  f"(rounds {min(ratios):.2f} to {max(ratios):.2f})", flush=True)  # fmt: skip
        config = base.flat() | {"output_dir": None, "rounds": args.rounds}
        seconds = sum(map(sum, times.values())) * args.steps
        record = Result("step_time", config, metrics, seconds, steps=args.steps, data={"seconds_per_step": times},
                        environment=run_environment(Accelerator(), bench))  # fmt: skip
        write_result(args.results / f"{model}.json", record)


if __name__ == "__main__":
    sys.exit(main())
