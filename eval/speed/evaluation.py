"""What does the evaluation of a task cost here, and what if each label is scored apart?

    python eval/speed/evaluation.py [--tasks sst2 agnews ...] [--rounds 5]         (needs $COPRA_DATA/mtl15)

SmolLM2-135M with an adapter (rank 8 on q, k, v) on the fifteen tasks; of each the first test examples that have
together at most 1200 tokens of prompt. *Apart*, as most scripts and lm-evaluation-harness do it, every label is a row
of its own, prompt and label: sorted by length, 16 rows a batch (8 took 0.93 and 1.02 of the time on SST-2 and RTE, 32
took 1.15 and 1.26), no cache, logits of the labels' tokens alone, inference mode. *Naive* is the same unsorted, with
all logits, on four of the tasks and once. Here: `evaluate`, with its default batch size. Losses and answers are
compared in each round. MiniLM scores all labels with one product in any case and is no contender.

*Stacking* is what several adapters in one pass could save at most: a base's passes over four batches against one pass
over all four, without any adapter.

One thread, interleaved rounds in one process; CPU seconds, since the machine may be shared. The record is written after
each task, and tasks that it has are not run again.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from copra_llm.batches import EncodedSplit
from copra_llm.build import Workbench, build
from copra_llm.coalitions import take
from copra_llm.config import RunConfig
from copra_llm.errors import InputError, exit_on_input_error
from copra_llm.evaluate import evaluate
from copra_llm.models import load_base
from copra_llm.results import Result, environment, peak_memory_bytes, read_result, write_result
from copra_llm.settings import ModelSettings
from copra_llm.tasks.mtl15 import task_names

RECORD = Path(__file__).parent / "results" / "evaluation.json"
TOKENS, EXAMPLES, BATCH, ROWS = 1200, 64, 64, 16
NAIVE = ("agnews", "amazon", "yelp", "sst2")
ROUNDING = 1e-3
"""Nats by which losses may differ: sums of some 30 nats in float32, in another order, and many layers deep."""
STACKED = {"minilm": (16, 64), "smollm2": (8, 64)}
"""Rows and tokens of one batch."""
SETTINGS = {"model_name_or_path": "smollm2", "max_length": 128, "lora_r": 8, "max_eval_samples": EXAMPLES}


def prepared(tasks: list[str]) -> Workbench:
    """The model with an adapter that acts, and the tasks' samples."""
    bench = build(RunConfig().replace(tasks=tasks, **SETTINGS), tasks, splits=("test",))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in bench.classifier.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.02, generator=generator)
    bench.classifier.eval()
    for name, split in bench.splits["test"].items():
        bench.splits["test"][name] = take(split, np.flatnonzero(split.lengths.cumsum() <= TOKENS))
    return bench


@torch.inference_mode()
def labels_apart(bench: Workbench, split: EncodedSplit, *, naive: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Losses in nats and answers `(n,)`, each label of each example a row of its own."""
    labels, model, pad = bench.classifier.label_ids[split.task.name], bench.classifier.model, bench.base.tokenizer
    rows = [(i, j, prompt + label) for i, prompt in enumerate(split.encoded) for j, label in enumerate(labels)]
    if not naive:
        rows.sort(key=lambda row: -len(row[2]))
    scores = torch.zeros(len(split), len(labels), dtype=torch.float64)
    for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS]
        batch = pad.pad({"input_ids": [row[:-1] for _, _, row in part]}, padding_side="left", return_tensors="pt")
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        keep = 0 if naive else max(len(labels[j]) for _, j, _ in part)  # 0: all
        logits = model(**batch, position_ids=positions, logits_to_keep=keep, use_cache=False).logits
        log_probs = logits.float().log_softmax(-1)
        for (i, j, _), own in zip(part, log_probs, strict=True):
            wanted = torch.tensor(labels[j])
            scores[i, j] = own[-len(wanted) :].gather(1, wanted[:, None]).sum()
    gold = torch.tensor(split.labels)
    return torch.nn.functional.cross_entropy(scores, gold, reduction="none").numpy(), scores.argmax(1).numpy()


def timed(function: Callable, *arguments, **options) -> tuple[float, object]:
    started = time.process_time()
    value = function(*arguments, **options)
    return time.process_time() - started, value


def measure(bench: Workbench, accelerator: Accelerator, name: str, rounds: int) -> tuple[dict[str, list[float]], float]:
    """CPU seconds of each way by round, and the largest difference of a loss in nats."""
    split = bench.splits["test"][name]
    times: dict[str, list[float]] = {"apart": [], "here": [], "naive": []}
    far = 0.0
    for _ in range(rounds):
        seconds, (nll, answers) = timed(labels_apart, bench, split)
        times["apart"].append(seconds)
        seconds, found = timed(evaluate, accelerator, bench.classifier, split, BATCH)
        times["here"].append(seconds)
        far = max(far, float(abs(found.nll - nll).max()))
        # Answers may only differ where two labels are within the rounding: it shows in no loss.
        if far > ROUNDING or (answers != found.predicted).mean() > 0.05:
            raise AssertionError(f"{name}: the two ways differ by {far:.1e} nats, or in their answers")
    if name in NAIVE:
        times["naive"].append(timed(labels_apart, bench, split, naive=True)[0])
    return times, far


def stacking(model: str, rounds: int) -> list[float]:
    """Four passes over a batch each divided by one pass over four batches, in CPU seconds, by round."""
    base = load_base(ModelSettings(model_name_or_path=model)).model.eval()
    rows, width = STACKED[model]
    ids = torch.randint(10, 1000, (4 * rows, width), generator=torch.Generator().manual_seed(0))
    keep = {"logits_to_keep": 1, "use_cache": False} if model == "smollm2" else {}

    def run(size: int) -> None:
        for part in ids.split(size):
            base(input_ids=part, attention_mask=torch.ones_like(part), **keep)

    with torch.inference_mode():
        run(rows)
        return [timed(run, rows)[0] / timed(run, 4 * rows)[0] for _ in range(rounds)]


def metrics_of(cells: dict[str, dict], stacked: dict[str, list[float]]) -> dict[str, float]:
    """Ratios with their range over rounds, their geometric means, examples a second, the largest difference."""
    metrics, by_round = {}, []
    for name, cell in cells.items():
        apart, here = cell["cpu_seconds"]["apart"], cell["cpu_seconds"]["here"]
        ratios = [a / h for a, h in zip(apart, here, strict=True)]
        by_round.append(ratios)
        metrics |= ranged(name, statistics.median(apart) / statistics.median(here), ratios) | {
            f"examples_per_second/{name}": cell["examples"] / statistics.median(here),
            f"largest_difference/{name}": cell["largest_difference"],
        }
        metrics |= {
            f"naive_ratio/{name}": seconds / statistics.median(here) for seconds in cell["cpu_seconds"]["naive"]
        }
    mean = statistics.geometric_mean(metrics[f"ratio/{name}"] for name in cells)
    rounds = [statistics.geometric_mean(ratios) for ratios in zip(*by_round, strict=True)]
    metrics |= ranged("geometric_mean", mean, rounds)
    for model, ratios in stacked.items():
        metrics |= ranged(f"stacking/{model}", statistics.median(ratios), ratios)
    return metrics


def ranged(name: str, ratio: float, rounds: list[float]) -> dict[str, float]:
    return {f"ratio/{name}": ratio, f"ratio_min/{name}": min(rounds), f"ratio_max/{name}": max(rounds)}


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=task_names())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RECORD)
    args = parser.parse_args()
    if args.rounds < 1:
        raise InputError(f"--rounds is {args.rounds}, but must be at least 1")
    torch.set_num_threads(1)
    before = read_result(args.output) if args.output.exists() else None
    cells, stacked = (before.data["tasks"], before.data["stacking"]) if before else ({}, {})
    seconds = before.seconds if before else 0.0
    missing = [name for name in args.tasks if name not in cells]
    bench, accelerator = prepared(missing) if missing else None, Accelerator(cpu=True)
    own = SETTINGS | {"tokens": TOKENS, "rows_apart": ROWS, "per_device_eval_batch_size": BATCH, "rounds": args.rounds}
    for name in [*missing, *(model for model in STACKED if model not in stacked)]:
        started = time.time()
        if name in STACKED:
            stacked[name] = stacking(name, max(args.rounds, 5))
        else:
            split = bench.splits["test"][name]
            times, far = measure(bench, accelerator, name, args.rounds)
            cells[name] = {"cpu_seconds": times, "largest_difference": far, "examples": len(split),
                           "labels": len(split.task.labels)}  # fmt: skip
        seconds += time.time() - started
        metrics = metrics_of(cells, stacked)
        shown = metrics[f"ratio/stacking/{name}" if name in STACKED else f"ratio/{name}"]
        print(f"{name}: {shown:.2f}; geometric mean {metrics['ratio/geometric_mean']:.2f}", flush=True)
        assert all(map(math.isfinite, metrics.values()))
        data = {"tasks": cells, "stacking": stacked}
        write_result(args.output, Result("speed_evaluation", own, metrics, seconds, peak_memory_bytes(), data=data,
                                         environment=environment(threads=1)))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
