"""What do coalitions of layers cost when they share hidden states, against one evaluation each?

    python eval/speed/coalitions.py [--rounds 3] [--models minilm smollm2]

Random adapters (q, k, v; rank 8) on the packaged models, examples of the packaged sample. Of minilm all 64 coalitions
of its 6 layers; of smollm2 random coalitions of its 30 layers, those of the default estimator, and all beginnings of
one random order. The plain way is `gates.applied(mask)` around `evaluate`. `pack` stands for that many coalitions
side by side in one pass.

One thread, interleaved rounds of one process. Ratios are of CPU seconds (medians; in brackets the range over rounds),
which are what the wall clock shows on an idle core. Blocks: runs of a transformer block for one batch, which is what
sharing can save at most.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from copra_llm.adapters import AdapterWeights, load_adapter_weights
from copra_llm.coalitions import CoalitionGame
from copra_llm.config import RunConfig
from copra_llm.errors import exit_on_input_error
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.models import add_adapter, load_base
from copra_llm.results import Result, peak_memory_bytes, write_result
from copra_llm.settings import LoraSettings, ModelSettings
from copra_llm.shapley import approximate

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Setting:
    """What is timed on one model."""

    task: str
    examples: int
    batch_size: int
    coalitions: dict[str, Callable[[int], np.ndarray]]
    """By name: number of players -> bool `(n, n_players)`."""
    packs: tuple[int, ...]
    dtype: str = "float32"


def everything(n: int) -> np.ndarray:
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)


def random_ones(n: int) -> np.ndarray:
    return np.random.default_rng(0).random((32, n)) < 0.5


def estimators_own(n: int) -> np.ndarray:
    """What the default estimator asks for with its smallest budget."""
    asked = []

    def game(coalitions: np.ndarray) -> np.ndarray:
        asked.append(coalitions)
        return coalitions.sum(1).astype(float)

    approximate(game, n, budget=2 * n + 4)
    return np.vstack(asked)


def beginnings(n: int) -> np.ndarray:
    """Of one random order of the players: 0, 1, ..., n of them."""
    rank = np.random.default_rng(0).permutation(n)
    return rank < np.arange(n + 1)[:, None]


SETTINGS = {
    "minilm": Setting("agnews", 32, 8, {"all 64 coalitions": everything}, (1, 8)),
    "smollm2": Setting(
        "sst2",
        8,
        8,
        {"32 random coalitions": random_ones, "64 of the default estimator": estimators_own, "one order": beginnings},
        packs=(1,),
        dtype="bfloat16",
    ),
}


def random_adapter(model: str, folder: Path) -> AdapterWeights:
    """Factors of no trained adapter, but of its shapes."""
    base = load_base(ModelSettings(model_name_or_path=model))
    peft_model = add_adapter(base, LoraSettings(lora_r=8, lora_alpha=16), init_seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.02, generator=generator)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return load_adapter_weights(folder)


def timed(function: Callable, *arguments) -> tuple[float, object]:
    started = time.process_time()
    value = function(*arguments)
    return time.process_time() - started, value


def measure(model: str, setting: Setting, rounds: int) -> tuple[dict[str, float], dict, AdapterEvaluator]:
    """Metrics by `<quantity>/<model>/<coalitions>/<way>`, and every round's CPU seconds."""
    import tempfile

    config = RunConfig().replace(
        model_name_or_path=model, dtype=setting.dtype, tasks=[setting.task], data_root="sample", max_length=64,
        max_eval_samples=setting.examples,
    )  # fmt: skip
    evaluator = AdapterEvaluator(config, [setting.task], "test")
    with tempfile.TemporaryDirectory() as folder:
        weights = random_adapter(model, Path(folder))
    games = {
        f"pack {pack}" if pack > 1 else "shared": CoalitionGame(
            evaluator, weights, setting.task, batch_size=setting.batch_size, pack=pack
        )
        for pack in setting.packs
    }
    metrics, seconds = {}, {}
    for name, make in setting.coalitions.items():
        some = next(iter(games.values()))
        coalitions = make(some.n_players)
        ways: dict[str, Callable] = {"plain": some.plain_outcomes} | {way: g.outcomes for way, g in games.items()}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            outcomes = {}
            for way, evaluate in ways.items():
                before = {w: g.blocks_computed for w, g in games.items()}
                spent, outcomes[way] = timed(evaluate, coalitions)
                times[way].append(spent)
                if way in games:
                    metrics[f"blocks/{model}/{name}/{way}"] = games[way].blocks_computed - before[way]
        batches = -(-setting.examples // setting.batch_size)
        metrics[f"blocks/{model}/{name}/plain"] = batches * coalitions.size
        for way in games:
            ratios = [a / b for a, b in zip(times["plain"], times[way], strict=True)]
            apart = np.abs(outcomes[way].nll.mean(1) - outcomes["plain"].nll.mean(1)).max()
            metrics |= {
                f"ratio/{model}/{name}/{way}": statistics.median(times["plain"]) / statistics.median(times[way]),
                f"ratio_min/{model}/{name}/{way}": min(ratios),
                f"ratio_max/{model}/{name}/{way}": max(ratios),
                f"largest_difference/{model}/{name}/{way}": float(apart),
            }
            ratio = metrics[f"ratio/{model}/{name}/{way}"]
            print(f"{model}, {name}, {way}: plain / {way} = {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
                  f"values differ by at most {apart:.1e}", flush=True)  # fmt: skip
        seconds[f"{model}/{name}"] = times
    return metrics, seconds, evaluator


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "coalitions.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()
    metrics, seconds = {}, {}
    for model in args.models:
        own_metrics, own_seconds, evaluator = measure(model, SETTINGS[model], args.rounds)
        metrics |= own_metrics
        seconds |= own_seconds
    settings = {m: {k: v for k, v in vars(SETTINGS[m]).items() if k != "coalitions"} for m in args.models}
    config = {"models": args.models, "rounds": args.rounds, **settings}
    record = Result(
        protocol="speed_coalitions", config=config, metrics=metrics, seconds=time.time() - started,
        peak_memory_bytes=peak_memory_bytes(), data={"cpu_seconds": seconds}, environment=evaluator.environment(),
    )  # fmt: skip
    write_result(args.output, record)


if __name__ == "__main__":
    sys.exit(main())
