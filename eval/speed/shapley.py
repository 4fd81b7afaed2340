"""How large is the error of a Shapley estimate, against shapiq at the same cost?

    python eval/speed/shapley.py [--repetitions 50] [--games NAME ...]    # some 15 minutes of an idle core

Games of 10 and 12 players whose 2^n values are known: real adapters (`games.py` made the tables in
`results/games/`) and synthetic ones. Every estimator, ours and shapiq's, gets the same batched game with a cache,
so a repeated coalition costs nothing.

- *Equal evaluations*: different coalitions are counted. shapiq counts repeated ones too; its budget is raised until
  the mean number of different ones is ours.
- *Equal time* = the estimator's own CPU seconds + different coalitions x the stated seconds of an evaluation. The
  table lookup that stands for the model is not counted. shapiq's budget is raised until its time is ours.

Own seconds are CPU seconds of one thread, which are what the wall clock shows on an idle core. The error is the root
mean square over players and repetitions, in percent of the root mean square of the exact values.
"""

import argparse
import json
import math
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from copra_llm.errors import exit_on_input_error
from copra_llm.results import Result, environment, read_result, write_result
from copra_llm.shapley import approximate, exact
from copra_llm.shapley.designs import all_coalitions

HERE = Path(__file__).parent
RECORD = HERE / "results" / "shapley.json"
OURS = ("quadrature", "adjusted")
NAMED = ("permutation", "owen", "kernel", "kernel, paired", "stratified")
"""The rivals that the target names; "kernel" in both of shapiq's settings."""
FURTHER = ("svarm", "unbiased kernel, paired", "k-additive")
"""shapiq's others, at equal evaluations; they draw no coalition twice."""
SECONDS = 0.001
"""Stated seconds of one evaluation. A real adapter's are tens to hundreds of times longer, and then the estimators'
own time disappears: the comparison at equal time lies between this one and that at equal evaluations."""
SHARES = (1 / 64, 1 / 16, 1 / 4)
"""Budgets as shares of all coalitions, where the estimators' minimum allows."""
PILOTS = 2


# --- games ------------------------------------------------------------------------------------------------


def synthetic(n: int = 12) -> dict[str, np.ndarray]:
    """Values `(2**n,)` of games with little, much and nothing to learn from one coalition for another."""
    rng = np.random.default_rng(7)
    x = all_coalitions(n).astype(float)
    unanimity = np.zeros(2**n)
    for _ in range(60):
        members = rng.choice(n, rng.integers(1, 5), replace=False)
        unanimity += rng.normal() * x[:, members].all(1)
    costs, votes, gain = rng.uniform(size=n), rng.integers(1, 10, n), rng.gamma(1.0, 1.0, n)
    pair = np.triu(rng.normal(0.0, 0.4, (n, n)), 1)
    hidden = np.tile(rng.normal(size=8), (2**n, 1))
    for layer in range(n):
        hidden = hidden + x[:, [layer]] * np.tanh(hidden @ rng.normal(0.0, 0.5, (8, 8)))
    logits = hidden @ rng.normal(size=(8, 4))
    return {
        "sum of unanimity": unanimity,
        "airport": (x * costs).max(1),
        "vote": (x @ votes > votes.sum() / 2).astype(float),
        "saturating": np.log1p(np.exp(4.0 - 1.2 * x @ gain - ((x @ pair) * x).sum(1))),
        "residual network": np.log(np.exp(logits).sum(1)) - logits[:, 0],
        "independent values": rng.normal(size=2**n),
    }


def real() -> dict[str, np.ndarray]:
    """Values of the recorded adapters, by record and metric."""
    games = {}
    for path in sorted((HERE / "results" / "games").glob("*.json")):
        data = read_result(path).data
        games |= {f"{path.stem}, {metric}": np.array(data[metric]) for metric in ("loss", "accuracy")}
    return games


class Table:
    """A batched, cached game; counts different coalitions and the seconds spent here."""

    def __init__(self, values: np.ndarray):
        self.values, self.seen, self.seconds = values, np.zeros(len(values), dtype=bool), 0.0
        self.n_players = len(values).bit_length() - 1

    def __call__(self, coalitions: np.ndarray) -> np.ndarray:
        started = time.process_time()
        codes = np.atleast_2d(coalitions).astype(bool) @ (1 << np.arange(self.n_players))
        self.seen[codes] = True
        answer = self.values[codes]
        self.seconds += time.process_time() - started
        return answer


# --- estimators -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One estimate."""

    values: np.ndarray
    evaluations: int
    own_seconds: float
    standard_errors: np.ndarray | None = None


def ours(name: str, table: np.ndarray, budget: int, seed: int) -> Run:
    game, started = Table(table), time.process_time()
    estimate = approximate(game, game.n_players, budget=budget, estimator=name, seed=seed)
    own = time.process_time() - started - game.seconds
    return Run(estimate.values, int(game.seen.sum()), own, estimate.standard_errors)


def shapiq_run(name: str, table: np.ndarray, budget: int, seed: int) -> Run:
    from shapiq import approximator as a

    game, n = Table(table), len(table).bit_length() - 1
    makers = {
        "permutation": lambda: a.PermutationSamplingSV(n, random_state=seed),
        "owen": lambda: a.OwenSamplingSV(n, random_state=seed),
        "kernel": lambda: a.KernelSHAP(n, random_state=seed),
        "kernel, paired": lambda: a.KernelSHAP(n, pairing_trick=True, random_state=seed),
        "stratified": lambda: a.StratifiedSamplingSV(n, random_state=seed),
        "svarm": lambda: a.SVARM(n, random_state=seed),
        "unbiased kernel, paired": lambda: a.UnbiasedKernelSHAP(n, pairing_trick=True, random_state=seed),
        "k-additive": lambda: a.kADDSHAP(n, max_order=2, random_state=seed),
    }
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = makers[name]().approximate(budget, game)
    own = time.process_time() - started - game.seconds
    return Run(np.array([found[(i,)] for i in range(n)]), int(game.seen.sum()), own)


class Pilot:
    """What a rival's budget buys on n players: different coalitions and own seconds, neither depends on values."""

    def __init__(self, name: str, n: int):
        values = np.random.default_rng(0).normal(size=2**n)
        shapiq_run(name, values, 64, 0)  # imports and first calls are nobody's cost
        self.budgets = np.unique(np.geomspace(2 * n + 4, 2**n, 12).astype(int))
        runs = [[shapiq_run(name, values, int(b), s) for s in range(PILOTS)] for b in self.budgets]
        self.evaluations = np.array([np.mean([r.evaluations for r in rs]) for rs in runs])
        self.own = np.array([np.median([r.own_seconds for r in rs]) for rs in runs])

    def for_evaluations(self, wanted: float) -> int:
        """The budget whose mean number of different coalitions is `wanted`."""
        return self._budget(self.evaluations, wanted)

    def for_time(self, wanted: float) -> int:
        """The budget that takes `wanted` seconds."""
        return self._budget(self.own + SECONDS * self.evaluations, wanted)

    def _budget(self, cost: np.ndarray, wanted: float) -> int:
        return int(np.interp(wanted, np.maximum.accumulate(cost), self.budgets))


# --- the comparison ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One estimator at one budget on one game."""

    estimator: str
    setting: str
    """What is equal: "evaluations" or "time"."""
    budget: int
    """Ours at this place; the rival's own may be larger."""
    evaluations: float
    """Mean of different coalitions."""
    own_seconds: float
    """Median CPU seconds."""
    error: float
    """Percent of the root mean square of the exact values."""
    relative_error_of_error: float
    """Standard error of `error` over repetitions, as a share of it."""
    calibration: float | None = None
    """Root mean square of (estimate - exact) / standard error; 1 is calibrated."""


def cell(estimator: str, setting: str, budget: int, runs: list[Run], truth: np.ndarray) -> Cell:
    squares = np.array([np.mean((run.values - truth) ** 2) for run in runs])
    scale = np.mean(truth**2)
    calibration = None
    if runs[0].standard_errors is not None:
        floor = 1e-9 * math.sqrt(scale)
        z = [(run.values - truth) / np.maximum(run.standard_errors, floor) for run in runs]
        calibration = float(np.sqrt(np.mean(np.square(z))))
    spread = squares.std(ddof=1) / math.sqrt(len(squares)) / max(squares.mean(), 1e-300) / 2
    return Cell(
        estimator, setting, budget, float(np.mean([run.evaluations for run in runs])),
        float(np.median([run.own_seconds for run in runs])), 100 * float(np.sqrt(squares.mean() / scale)),
        float(spread), calibration,
    )  # fmt: skip


def compare(table: np.ndarray, pilots: dict[str, Pilot], repetitions: int) -> list[Cell]:
    """Ours at every budget, and every rival at equal evaluations and at equal time."""
    game = Table(table)
    truth = exact(game, game.n_players).values
    seeds, cells = range(repetitions), []
    for share in SHARES:
        budget = int(share * len(table))
        if budget < 2 * game.n_players + 4:
            continue
        for name in OURS:
            cells.append(cell(name, "evaluations", budget, [ours(name, table, budget, s) for s in seeds], truth))
        own = cells[-len(OURS)]
        for name in FURTHER:
            cells.append(cell(name, "evaluations", budget, [shapiq_run(name, table, budget, s) for s in seeds], truth))
        for name, pilot in pilots.items():
            settings = {"evaluations": pilot.for_evaluations(own.evaluations),
                        "time": pilot.for_time(own.own_seconds + SECONDS * own.evaluations)}  # fmt: skip
            runs = {b: [shapiq_run(name, table, b, s) for s in seeds] for b in set(settings.values())}
            cells += [cell(name, setting, budget, runs[b], truth) for setting, b in settings.items()]
    return cells


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--games", nargs="+", help="unset: all; those in the record are not run again")
    args = parser.parse_args()
    config = {"repetitions": args.repetitions, "seconds_per_evaluation": SECONDS, "shares": SHARES, "ours": OURS,
              "named": NAMED, "further": FURTHER}  # fmt: skip
    old = read_result(RECORD) if RECORD.exists() else None
    same = old is not None and old.config == json.loads(json.dumps(config))
    done, seconds = (old.data["games"], old.seconds) if same else ({}, 0.0)
    pilots: dict[int, dict[str, Pilot]] = {}
    games = real() | synthetic()
    for name, values in games.items():
        if name in done or (args.games and name not in args.games):
            continue
        started, n = time.perf_counter(), len(values).bit_length() - 1
        if n not in pilots:
            pilots[n] = {rival: Pilot(rival, n) for rival in NAMED}
        done[name] = [asdict(c) for c in compare(values, pilots[n], args.repetitions)]
        seconds += time.perf_counter() - started
        ordered = {game: done[game] for game in (*games, *done) if game in done}
        record = Result("speed_shapley", config, {"games": len(done)}, seconds, data={"games": ordered},
                        environment=environment(threads=1, shapiq=version("shapiq")))  # fmt: skip
        write_result(RECORD, record)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
