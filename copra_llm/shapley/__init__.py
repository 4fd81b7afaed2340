"""How much of an adapter's effect does each layer bring?

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S))

The Shapley value of player i in the game v. This package knows no model: a game is a function
`game(coalitions: bool (n_coalitions, n_players)) -> values (n_coalitions,)`, deterministic and finite.

| estimator | what it is | mean over seeds | standard errors | efficient |
|---|---|---|---|---|
| `exact` | all 2^n coalitions, up to 16 players | exact | 0 | yes |
| `permutation` | marginals along random orders | unbiased | of a mean of rounds | yes |
| `owen` | the paper's multilinear extension | unbiased | of a mean of rounds | in the limit |
| `stratified` | membership's covariance with the value, by size | unbiased | by size | yes |
| `adjusted` | stratified, on what a surrogate leaves | unbiased | by size, of leave-one-out terms | yes |
| `regression` | paired KernelSHAP | consistent | sandwich, HC3 | yes |
| `quadrature` | posterior mean, coalitions chosen to tell most | consistent | the posterior's | yes |

`quadrature`, the default, has the least error (`eval/speed/README.md`); `adjusted` comes next, and its standard
errors and its lack of bias rest on no assumption about the game. The last four let every evaluation tell something
of every player and draw no coalition twice. `adjusted` and `quadrature` solve systems of half the budget's size:
below a second up to 1000 evaluations, minutes at their limit of 10000.

**Budget**: different coalitions, the empty and the full one among them. It is never exceeded, a repeated
coalition is not paid twice, and a budget of 2^n (up to 16 players) gives the exact values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from copra_llm.errors import InputError, nearest
from copra_llm.shapley.cache import CoalitionCache, Evaluations, Game
from copra_llm.shapley.designs import all_coalitions
from copra_llm.shapley.estimate import Estimate
from copra_llm.shapley.evenness import gini, top_third_share
from copra_llm.shapley.exact import MAX_PLAYERS, exact_values
from copra_llm.shapley.marginals import Owen, Permutation
from copra_llm.shapley.quadrature import Adjusted, Quadrature
from copra_llm.shapley.strata import Regression, Stratified

__all__ = [
    "ESTIMATORS",
    "MAX_PLAYERS",
    "Adjusted",
    "CoalitionCache",
    "Estimate",
    "Game",
    "Owen",
    "Permutation",
    "Quadrature",
    "Regression",
    "Stratified",
    "approximate",
    "exact",
    "gini",
    "top_third_share",
]

ESTIMATORS = {
    "permutation": Permutation,
    "owen": Owen,
    "stratified": Stratified,
    "adjusted": Adjusted,
    "regression": Regression,
    "quadrature": Quadrature,
}
"""By name; "exact" besides."""
_GROWTH = 1.25  # how much is drawn between two looks at the standard errors


def exact(game: Game, n_players: int, *, batch_size: int = 256, cache: CoalitionCache | None = None) -> Estimate:
    """Shapley values by enumeration.

    Raises:
        InputError: if there are more than `MAX_PLAYERS` players.
    """
    if not 1 <= n_players <= MAX_PLAYERS:
        raise InputError(
            f"exact values of {n_players} players would take 2^{n_players} evaluations, and up to {MAX_PLAYERS} "
            "players are enumerated; take another estimator with a budget, or group the players"
        )
    run = Evaluations(game, _fitting(cache, n_players), batch_size)
    coalitions = all_coalitions(n_players)
    values = run(coalitions)
    phi = exact_values(coalitions, values)
    return Estimate(
        "exact", phi, np.zeros(n_players), float(values[0]), float(values[-1]), run.used, run.asked, unbiased=True
    )


def approximate(
    game: Game,
    n_players: int,
    *,
    budget: int,
    estimator: str | Permutation | Owen | Stratified | Adjusted | Regression | Quadrature = "quadrature",
    seed: int = 0,
    wanted_error: float | None = None,
    batch_size: int = 256,
    cache: CoalitionCache | None = None,
) -> Estimate:
    """Shapley values within a budget.

    Args:
        game: what is evaluated; given at most `batch_size` coalitions at once.
        n_players: number of players.
        budget: most different coalitions to evaluate; 2^n or more (up to 16 players) means exact.
        estimator: a name in `ESTIMATORS`, "exact", or an estimator with its options, as `Owen(nodes="uniform")`.
        seed: of the coalitions, in [0, 2**64); the same seed draws the same ones.
        wanted_error: stop as soon as no standard error is larger, in the game's unit. Looked at whenever a
            quarter more has been drawn. An estimate that stops on what it has seen is not unbiased any more.
        batch_size: coalitions at once; changes nothing but speed.
        cache: what has been evaluated already; takes up what is new.

    Raises:
        InputError: if an argument is out of range, or the budget is too small for the estimator.
    """
    if estimator == "exact" or (n_players <= MAX_PLAYERS and budget >= 2**n_players):
        if n_players <= MAX_PLAYERS and budget < 2**n_players:
            raise InputError(f"exact values of {n_players} players take {2**n_players} evaluations, the budget is "
                             f"{budget}; raise it or take another estimator")  # fmt: skip
        return exact(game, n_players, batch_size=batch_size, cache=cache)
    method, name = _resolve(estimator)
    _check(n_players, budget, method, name, seed)
    run = Evaluations(game, _fitting(cache, n_players), batch_size)
    v_empty, v_full = map(float, run(np.array([[False] * n_players, [True] * n_players])))
    drawn, values = np.zeros((0, n_players), dtype=bool), np.zeros(0)
    for more in _looks(method.rounds(n_players, seed, budget), n_players, wanted_error is not None):
        drawn, values = np.vstack([drawn, more]), np.append(values, run(more))
        phi, errors = method.solve((v_empty, v_full), drawn, values)
        if wanted_error is not None and errors.max() <= wanted_error:
            break
    unbiased = method.unbiased and wanted_error is None
    return Estimate(name, phi, errors, v_empty, v_full, run.used, run.asked, unbiased)


def _looks(rounds: Iterable[np.ndarray], n_players: int, many: bool) -> Iterator[np.ndarray]:
    """The rounds `(k, n)`, joined into one piece or into pieces that grow with what was drawn before."""
    pending, size, total = [], 0, 0
    for piece in rounds:
        pending.append(piece)
        size += len(piece)
        if many and size >= max(4 * n_players, (_GROWTH - 1) * total):
            yield np.vstack(pending)
            pending, size, total = [], 0, total + size
    if pending:
        yield np.vstack(pending)


def _resolve(estimator) -> tuple:
    """The estimator object and its name."""
    if not isinstance(estimator, str):
        name = next((name for name, kind in ESTIMATORS.items() if type(estimator) is kind), None)
        if name is None:
            raise InputError(f"{estimator!r} is no estimator; give one of exact, {', '.join(ESTIMATORS)}")
        return estimator, name
    if estimator not in ESTIMATORS:
        known = ["exact", *ESTIMATORS]
        raise InputError(f'the estimator is "{estimator}", but must be one of {", ".join(known)}'
                         f"{nearest(estimator, known)}")  # fmt: skip
    return ESTIMATORS[estimator](), estimator


def _check(n_players: int, budget: int, method, name: str, seed: int) -> None:
    if n_players < 1:
        raise InputError(f"the game has {n_players} players, but must have at least 1")
    if not 0 <= seed < 2**64:
        raise InputError(f"the seed is {seed}, but must lie in [0, 2^64)")
    minimum = method.minimum(max(n_players, 2))
    if n_players <= MAX_PLAYERS:
        minimum = min(minimum, 2**n_players)
    if budget < minimum:
        raise InputError(
            f"a budget of {budget} evaluations is too small for the estimator {name} with {n_players} players; "
            f"give at least {minimum}"
        )
    largest = getattr(method, "largest", budget)
    if budget > largest:
        raise InputError(
            f"a budget of {budget} evaluations is too large for the estimator {name}, whose systems of equations grow "
            f"with it; give at most {largest}, or take stratified, regression or permutation"
        )


def _fitting(cache: CoalitionCache | None, n_players: int) -> CoalitionCache:
    if cache is None:
        return CoalitionCache(n_players)
    if cache.n_players != n_players:
        raise InputError(f"the cache is of {cache.n_players} players, the game has {n_players}; give the game's own")
    return cache
