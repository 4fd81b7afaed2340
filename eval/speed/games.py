"""Every coalition's value of real adapters, once, so that the benchmark of estimators can replay them.

    python eval/speed/games.py --runs RUNS [--games NAME ...]

RUNS is a folder of training runs as `eval/interpolation/run.py` leaves it (`<model>/<task>/<method>/<run>`).
Loss and accuracy come from the same passes. Finished chunks are kept in `results/games/NAME.part.jsonl`; a game
with a record is not evaluated again.

Players: MiniLM's 18 modules as 12, query and key of a layer together and its value alone; SmolLM2's 30 layers as
10 groups of three.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from copra_llm.errors import InputError, exit_on_input_error
from copra_llm.results import Result, write_result
from copra_llm.shapley.designs import all_coalitions

FOLDER = Path(__file__).parent / "results" / "games"
CHUNK = 256


@dataclass(frozen=True)
class Adapter:
    run: str
    """Folder below RUNS."""
    task: str
    examples: int
    """The first so many of the dev split."""
    granularity: str
    widths: tuple[int, ...]
    """Gates of each player: neighbours in the order of `LayerGates`."""


MODULES, LAYERS = (2, 1) * 6, (3,) * 10
GAMES = {
    "minilm-dbpedia-lora": Adapter("minilm/dbpedia/lora/lr0.004-steps300-seed0", "dbpedia", 56, "module", MODULES),
    "minilm-sst2-copra": Adapter("minilm/sst2/copra/lr0.004-steps300-seed0", "sst2", 24, "module", MODULES),
    "smollm2-sst2-lora": Adapter("smollm2/sst2/lora/lr0.002-steps75-seed0", "sst2", 16, "layer", LAYERS),
    "smollm2-sst2-lora-64": Adapter("smollm2/sst2/lora/lr0.002-steps75-seed0", "sst2", 64, "layer", LAYERS),
}


def evaluate_all(name: str, runs: Path) -> Result:
    """Loss and accuracy of every coalition of one adapter's players."""
    from copra_llm.adapters import load_adapter_weights
    from copra_llm.cli.common import bar
    from copra_llm.config import RunConfig, read_settings
    from copra_llm.evaluator import AdapterEvaluator

    adapter, started = GAMES[name], time.perf_counter()
    folder = runs / adapter.run
    if not folder.is_dir():
        raise InputError(f"{folder} is not there; give the folder of the training runs as --runs")
    config = RunConfig.from_flat(read_settings(folder / "config.yaml")).replace(
        max_eval_samples=adapter.examples, per_device_eval_batch_size=adapter.examples, max_length=48, output_dir="-"
    )
    from copra_llm.coalitions import CoalitionGame

    evaluator = AdapterEvaluator(config, [adapter.task], "dev")
    game = CoalitionGame(evaluator, load_adapter_weights(folder), adapter.task, granularity=adapter.granularity)
    coalitions = all_coalitions(len(adapter.widths))
    gates = np.repeat(coalitions, adapter.widths, axis=1)
    part = FOLDER / f"{name}.part.jsonl"
    part.parent.mkdir(parents=True, exist_ok=True)
    loss, accuracy = (np.full(len(coalitions), np.nan) for _ in range(2))
    for line in part.read_text().splitlines() if part.exists() else ():
        codes, losses, accuracies = json.loads(line)
        loss[codes], accuracy[codes] = losses, accuracies
    order = game.order(gates)  # neighbours share most hidden states
    missing = order[np.isnan(loss[order])]
    for start in bar("chunk")(range(0, len(missing), CHUNK)):
        codes = missing[start : start + CHUNK]
        outcomes = game.outcomes(gates[codes])
        loss[codes], accuracy[codes] = outcomes.nll.mean(1), 100.0 * outcomes.correct.mean(1)
        with part.open("a") as f:
            f.write(json.dumps([codes.tolist(), loss[codes].tolist(), accuracy[codes].tolist()]) + "\n")
    players = np.split(np.array(game.gates.keys), np.cumsum(adapter.widths)[:-1])
    settings = config.flat() | {"output_dir": None, "adapter": adapter.run, "split": "dev", "task": adapter.task}
    result = Result(
        "game", settings, {"players": len(players)}, time.perf_counter() - started, examples=adapter.examples,
        data={"players": [" + ".join(group) for group in players],
              "loss": [float(f"{v:.8g}") for v in loss], "accuracy": [float(f"{v:.8g}") for v in accuracy]},
        environment=evaluator.environment(),
    )  # fmt: skip
    write_result(FOLDER / f"{name}.json", result)
    part.unlink()
    return result


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--games", nargs="+", choices=GAMES, default=list(GAMES))
    args = parser.parse_args()
    for name in args.games:
        if not (FOLDER / f"{name}.json").exists():
            result = evaluate_all(name, args.runs)
            print(f"{name}: {len(result.data['loss'])} coalitions in {result.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
