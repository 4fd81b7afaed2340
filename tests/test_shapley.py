"""Do the estimators find the Shapley values that games with a closed form have, and hold what they promise?"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from copra_llm.errors import InputError
from copra_llm.shapley import (
    ESTIMATORS,
    CoalitionCache,
    Owen,
    Permutation,
    approximate,
    exact,
    gini,
    top_third_share,
)
from copra_llm.shapley.designs import all_coalitions, pairs, subsets, uniforms, with_complements
from copra_llm.shapley.marginals import gauss_legendre
from copra_llm.shapley.quadrature import most_telling, with_grand_pair
from copra_llm.shapley.surrogate import Prior, posterior

REUSE = ("stratified", "adjusted", "regression", "quadrature")
VARIANTS = {
    **{name: kind() for name, kind in ESTIMATORS.items()},
    "permutation, plain": Permutation(antithetic=False),
    "owen, plain": Owen(antithetic=False),
    "owen, uniform": Owen(nodes="uniform"),
    "owen, uniform, plain": Owen(nodes="uniform", antithetic=False),
}


# --- games with a closed form -----------------------------------------------------------------------------


def unanimity(members: list[int]):
    """1 if all of T are there: 1 / |T| for each of T."""
    return lambda coalitions: coalitions[:, members].all(1).astype(float)


def additive(weights: np.ndarray):
    return lambda coalitions: coalitions @ weights


def airport(costs: np.ndarray):
    """The costliest member's cost; its values add up each step of cost, shared by all who need it."""
    return lambda coalitions: (coalitions * costs).max(1)


def airport_values(costs: np.ndarray) -> np.ndarray:
    order = np.argsort(costs)
    shares = np.cumsum(np.diff(costs[order], prepend=0.0) / np.arange(len(costs), 0, -1))
    return shares[np.argsort(order)]


def glove(coalitions: np.ndarray) -> np.ndarray:
    """One left glove (player 0), the others have right ones: a pair is worth 1; player 0 gets (n - 1) / n."""
    return (coalitions[:, 0] & coalitions[:, 1:].any(1)).astype(float)


def majority(quota: float, votes: np.ndarray):
    return lambda coalitions: (coalitions @ votes >= quota).astype(float)


def table(values: np.ndarray):
    """A game by its `2**n` values: the same number whatever else is in the batch."""
    n = len(values).bit_length() - 1
    return lambda coalitions: values[coalitions @ (1 << np.arange(n))]


def dense(n: int, seed: int = 0):
    """Independent values: nothing to learn from one coalition for another."""
    return table(np.random.default_rng(seed).normal(size=2**n))


def smooth(n: int, seed: int = 0):
    """Saturating and with interactions of every degree, as a loss is."""
    rng = np.random.default_rng(seed)
    gain, pair = rng.gamma(1.0, 1.0, n), np.triu(rng.normal(0.0, 0.3, (n, n)), 1)
    x = all_coalitions(n).astype(float)
    return table(-np.log1p(np.exp(3.0 - x @ gain - ((x @ pair) * x).sum(1))))


class Counting:
    """Passes a game's values on and notes what was asked."""

    def __init__(self, game, stop_after: int | None = None):
        self.game, self.stop_after = game, stop_after
        self.rows: list[bytes] = []
        self.largest_batch = 0

    def __call__(self, coalitions: np.ndarray) -> np.ndarray:
        if self.stop_after is not None and len(self.rows) >= self.stop_after:
            raise KeyboardInterrupt
        self.rows += [row.tobytes() for row in coalitions]
        self.largest_batch = max(self.largest_batch, len(coalitions))
        return self.game(coalitions)


COSTS = np.array([1.0, 2.0, 2.0, 3.5, 5.0, 8.0, 8.0, 9.0])


@pytest.mark.parametrize(
    "game, values",
    [
        (unanimity([1, 4, 6]), np.isin(np.arange(9), [1, 4, 6]) / 3),
        (additive(np.arange(8.0) - 3), np.arange(8.0) - 3),
        (airport(COSTS), airport_values(COSTS)),
        (glove, np.array([9 / 10] + [1 / 90] * 9)),
        (majority(9.0, np.ones(9)), np.full(9, 1 / 9)),
        (majority(3.0, np.array([2.0] + [1.0] * 2)), np.array([2 / 3, 1 / 6, 1 / 6])),
    ],
    ids=["unanimity", "additive", "airport", "glove", "everyone", "two votes of four"],
)
def test_exact_is_the_closed_form(game, values):
    estimate = exact(game, len(values))
    np.testing.assert_allclose(estimate.values, values, atol=1e-12)
    assert estimate.evaluations == 2 ** len(values) and not estimate.standard_errors.any()


@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_exact_is_efficient(n):
    estimate = exact(dense(n), n)
    assert abs(estimate.efficiency_gap) < 1e-6
    assert abs(estimate.efficiency_gap) < 1e-12 * 2**n  # and by rounding alone


def test_axioms_of_the_exact_values():
    """Symmetry, dummy player, linearity, and what a permutation of the players does."""
    n, first, second = 8, smooth(8, 1), dense(8, 2)
    both = exact(lambda c: 2.0 * first(c) - 3.0 * second(c), n).values
    np.testing.assert_allclose(both, 2.0 * exact(first, n).values - 3.0 * exact(second, n).values, atol=1e-12)

    without_3 = exact(lambda c: second(c & (np.arange(n) != 3)), n).values
    assert abs(without_3[3]) < 1e-12

    symmetric = exact(lambda c: second(np.column_stack([np.sort(c[:, :2], axis=1), c[:, 2:]])), n).values
    assert abs(symmetric[0] - symmetric[1]) < 1e-12

    order = np.array([3, 1, 7, 0, 2, 6, 5, 4])  # player order[k] plays the part of player k
    renamed = exact(lambda c: second(c[:, order]), n).values
    np.testing.assert_allclose(renamed[order], exact(second, n).values, atol=1e-12)


def test_exact_agrees_with_shapiq():
    """The oracle: another implementation of the definition."""
    from shapiq import ExactComputer

    for game in (dense(9, 5), smooth(9, 5), majority(20.5, np.arange(9.0))):
        oracle = ExactComputer(game, 9)("SV")
        np.testing.assert_allclose(exact(game, 9).values, [oracle[(i,)] for i in range(9)], atol=1e-12)


# --- what the estimators promise --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "stratified"])
def test_an_additive_game_is_found_exactly(name):
    """All marginals of a player are the same, so any sample gives them.

    Not so the stratified estimator, in which the other players' membership is noise. The surrogate shrinks main
    effects by 1 / (FLAT times evaluations), which `adjusted` sees in its predictions.
    """
    weights = np.random.default_rng(3).normal(size=9)
    estimate = approximate(additive(weights), 9, budget=200, estimator=VARIANTS[name])
    np.testing.assert_allclose(estimate.values, weights, atol=5e-3 if name == "adjusted" else 1e-5)


@pytest.mark.parametrize("name", REUSE)
def test_all_pairs_give_the_exact_values(name):
    """Sampling without replacement ends at the definition. The tolerance is the surrogate's jitter."""
    for n in (5, 8):
        game, estimator = dense(n, 7), ESTIMATORS[name]()
        drawn = np.vstack(list(estimator.rounds(n, 0, 2**n)))
        assert len(np.unique(drawn, axis=0)) == len(drawn) == 2**n - 2
        ends = game(all_coalitions(n)[[0, -1]])
        values, errors = estimator.solve(tuple(ends), drawn, game(drawn))
        np.testing.assert_allclose(values, exact(game, n).values, atol=1e-5)
        assert errors.max() < 1e-2


@pytest.mark.parametrize("name", ["stratified", "adjusted"])
@pytest.mark.parametrize("n, drawn", [(4, {1: 3, 2: 2}), (5, {1: 4, 2: 3})])
def test_the_mean_over_all_samples_is_the_exact_value(name, n, drawn):
    """Unbiased to rounding: every sample of so many pairs of each size, all equally likely, evaluated."""
    game = dense(n, 11)
    by_size = {size: list(subsets(n, size, 0)) for size in drawn}
    ends = tuple(game(all_coalitions(n)[[0, -1]]))
    samples = itertools.product(*(itertools.combinations(by_size[size], m) for size, m in drawn.items()))
    found = []
    for sample in samples:
        coalitions = with_complements(np.array(sum(sample, ())))
        found.append(ESTIMATORS[name]().solve(ends, coalitions, game(coalitions))[0])
    assert len(found) == math.prod(math.comb(len(by_size[size]), m) for size, m in drawn.items())
    np.testing.assert_allclose(np.mean(found, axis=0), exact(game, n).values, atol=1e-6)


def test_the_mean_over_all_orders_is_the_exact_value():
    n, game = 5, dense(5, 11)
    ends = tuple(game(all_coalitions(n)[[0, -1]]))
    orders = np.array(list(itertools.permutations(range(n))))
    coalitions = (orders[:, None, :] < np.arange(1, n)[:, None]).reshape(-1, n)
    values, _ = Permutation(antithetic=False).solve(ends, coalitions, game(coalitions))
    np.testing.assert_allclose(values, exact(game, n).values, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, kind in VARIANTS.items() if kind.unbiased])
@pytest.mark.parametrize("kind", ["smooth", "dense", "majority"])
def test_unbiased(name, kind):
    """The mean over seeds is the exact value, at a small budget.

    200 seeds: a bias of half an estimate's standard deviation moves z by 7. Of 8 players, 8 estimators and 3
    games one |z| in 192 passes 4.2 with probability 0.5 %; seeds are fixed, so it does not come and go.
    """
    n, estimator = 8, VARIANTS[name]
    game = {"smooth": smooth(n), "dense": dense(n), "majority": majority(18.0, np.arange(1.0, n + 1))}[kind]
    budget = max(60, estimator.minimum(n))
    runs = np.array([approximate(game, n, budget=budget, estimator=estimator, seed=s).values for s in range(200)])
    deviation = runs.std(0, ddof=1) / math.sqrt(len(runs))
    z = (runs.mean(0) - exact(game, n).values) / np.maximum(deviation, 1e-12)
    assert np.abs(z).max() < 4.2


@pytest.mark.parametrize("name", [name for name, kind in VARIANTS.items() if not kind.unbiased])
def test_consistent(name):
    """Four times the budget at least halves the error, as unbiased sampling would; the last step ends exact."""
    n, game = 9, smooth(9, 4)
    truth = exact(game, n).values
    errors = [
        np.sqrt(np.mean([(approximate(game, n, budget=b, estimator=VARIANTS[name], seed=s).values - truth) ** 2
                         for s in range(20)]))
        for b in (26, 104, 416, 512)
    ]  # fmt: skip
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2 and errors[3] < 1e-9


@pytest.mark.parametrize(
    "name, low, high",
    [
        # Root mean square of (estimate - exact) / standard error; 1 is calibrated.
        ("permutation", 0.8, 1.3),
        ("permutation, plain", 0.8, 1.3),
        ("owen, uniform", 0.8, 1.3),
        ("owen", 0.8, 1.7),  # five rounds: Student's t with 4 degrees of freedom has the root mean square 1.41
        ("stratified", 0.8, 1.3),
        ("adjusted", 0.8, 1.5),  # leave-one-out terms share the other draws
        ("regression", 0.8, 1.3),
        ("quadrature", 0.4, 2.0),  # holds if the game looks like a draw from the prior
    ],
)
def test_standard_errors_are_calibrated(name, low, high):
    n = 10
    for game in (smooth(n, 2), dense(n, 2)):
        truth = exact(game, n).values
        z = []
        for seed in range(25):
            estimate = approximate(game, n, budget=280, estimator=VARIANTS[name], seed=seed)
            z.append((estimate.values - truth) / estimate.standard_errors)
        assert low < np.sqrt(np.mean(np.square(z))) < high


@pytest.mark.parametrize("name", VARIANTS)
def test_a_standard_error_is_unknown_after_one_round_only(name):
    n, estimator = 9, VARIANTS[name]
    estimate = approximate(dense(n), n, budget=estimator.minimum(n), estimator=estimator)
    one_round = "permutation" in name or "owen" in name
    assert np.isinf(estimate.standard_errors).all() if one_round else np.isfinite(estimate.standard_errors).all()


@pytest.mark.parametrize("name", ["permutation", "stratified", "adjusted", "regression", "quadrature"])
def test_efficient(name):
    """The values sum to v(N) - v(empty) at any budget; the surrogate's jitter sets the tolerance."""
    for seed in range(5):
        estimate = approximate(dense(10, seed), 10, budget=100, estimator=name, seed=seed)
        assert abs(estimate.efficiency_gap) < 1e-5


def test_quadrature_has_the_least_error_and_adjusted_comes_next():
    n, game = 12, smooth(12)
    truth = exact(game, n).values
    error = {
        name: np.sqrt(np.mean([(approximate(game, n, budget=256, estimator=name, seed=s).values - truth) ** 2
                               for s in range(5)]))
        for name in ESTIMATORS
    }  # fmt: skip
    assert error["quadrature"] < error["adjusted"] / 1.5
    assert error["adjusted"] < min(v for k, v in error.items() if k not in ("quadrature", "adjusted")) / 1.3


# --- budget, cache, resume --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_the_budget_is_never_exceeded_and_nothing_is_paid_twice(name):
    n, estimator = 8, VARIANTS[name]
    for budget in (estimator.minimum(n), 75, 100, 131, 255):
        counting = Counting(dense(n))
        estimate = approximate(counting, n, budget=max(budget, estimator.minimum(n)), estimator=estimator, batch_size=7)
        assert len(counting.rows) == len(set(counting.rows)) == estimate.evaluations == estimate.new_evaluations
        assert estimate.evaluations <= max(budget, estimator.minimum(n))
        assert counting.largest_batch <= 7
        if name in REUSE:  # these spend what they are given, to the pair
            assert estimate.evaluations >= budget - 1


@pytest.mark.parametrize("name", VARIANTS)
def test_a_budget_of_all_coalitions_is_exact(name):
    counting = Counting(dense(6))
    estimate = approximate(counting, 6, budget=2**6, estimator=VARIANTS[name])
    np.testing.assert_allclose(estimate.values, exact(dense(6), 6).values, atol=1e-12)
    assert len(counting.rows) == 2**6 and estimate.estimator == "exact"


@pytest.mark.parametrize("name", [*VARIANTS, "exact"])
def test_a_stopped_run_goes_on_to_the_same_numbers(name):
    """What the killed run had evaluated is not asked again; the batch size changes nothing."""
    n, game = 8, smooth(8)
    estimator = VARIANTS.get(name, name)
    budget = 2**n if name == "exact" else 140
    whole = approximate(game, n, budget=budget, estimator=estimator, seed=5)
    log: list[tuple[str, float]] = []
    first = Counting(game, stop_after=40)
    with pytest.raises(KeyboardInterrupt):
        approximate(first, n, budget=budget, estimator=estimator, seed=5, batch_size=9,
                    cache=CoalitionCache(n, on_new=log.extend))  # fmt: skip
    assert len(log) == len(first.rows) >= 40
    second = Counting(game)
    rest = approximate(second, n, budget=budget, estimator=estimator, seed=5, cache=CoalitionCache(n, log))
    assert np.array_equal(rest.values, whole.values) and np.array_equal(rest.standard_errors, whole.standard_errors)
    assert rest.evaluations == whole.evaluations == len(set(first.rows + second.rows))
    assert rest.new_evaluations == len(second.rows) == rest.evaluations - len(log)


@pytest.mark.parametrize("name, wanted", [("permutation", (0.2, 0.1)), ("adjusted", (0.06, 0.02)),
                                          ("quadrature", (0.03, 0.01))])  # fmt: skip
def test_sampling_goes_on_until_the_wanted_error(name, wanted):
    n, game = 10, smooth(10)
    loose, tight = (approximate(game, n, budget=1000, estimator=name, wanted_error=e) for e in wanted)
    assert loose.standard_errors.max() <= wanted[0] and tight.standard_errors.max() <= wanted[1]
    assert loose.evaluations < tight.evaluations < 1000
    capped = approximate(game, n, budget=100, estimator=name, wanted_error=1e-9)
    assert capped.evaluations <= 100 and capped.standard_errors.max() > 1e-9


@pytest.mark.parametrize("name", VARIANTS)
def test_a_larger_budget_goes_on_where_a_smaller_one_ended(name):
    n, estimator = 13, VARIANTS[name]
    small, large = (np.vstack(list(estimator.rounds(n, 3, budget))) for budget in (500, 800))
    assert len(small) < len(large)
    assert np.array_equal(large[: len(small)], small)


def test_draws_are_a_function_of_the_seed_alone():
    """Golden numbers: the same on every machine; no global generator moves."""
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    np.testing.assert_array_equal(uniforms(7, 1, 2, (2, 2)), GOLDEN)
    first = approximate(dense(7), 7, budget=60, seed=2**64 - 1)
    assert np.array_equal(first.values, approximate(dense(7), 7, budget=60, seed=2**64 - 1).values)
    assert not np.array_equal(first.values, approximate(dense(7), 7, budget=60, seed=0).values)
    assert np.array_equal(before, np.random.get_state()[1])


GOLDEN = [[0.09947711776473811, 0.5247499068098906], [0.29007721258925234, 0.904293014883872]]


# --- the mathematics inside -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [5, 6])
def test_gauss_legendre_is_exact_in_q(n):
    """With every E weighted by its probability, the nodes give the Shapley value itself."""
    game, coalitions = dense(n), all_coalitions(n)
    values, sizes = game(coalitions), coalitions.sum(1)
    flipped = np.arange(2**n)[:, None] ^ (1 << np.arange(n))  # (2^n, n)
    marginal = np.where(coalitions, -1, 1) * (values[flipped] - values[:, None])
    total = sum(w * (q**sizes * (1 - q) ** (n - sizes)) @ marginal for q, w in zip(*gauss_legendre(n), strict=True))
    np.testing.assert_allclose(total, exact(game, n).values, atol=1e-12)
    assert len(gauss_legendre(n)[0]) == math.ceil(n / 2)


def walsh(n: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, ...]]]:
    """All coalitions, the odd Walsh functions at them `(2^n, functions)`, and the functions' player sets."""
    sets = [t for d in range(1, n + 1, 2) for t in itertools.combinations(range(n), d)]
    signs = np.where(all_coalitions(n), 1.0, -1.0)
    return all_coalitions(n), np.stack([signs[:, t].prod(1) for t in sets], axis=1), sets


@pytest.mark.parametrize("n", [4, 5])
@pytest.mark.parametrize("decay", [0.2, 1.0])
def test_the_prior_is_that_of_random_walsh_coefficients(n, decay):
    """Covariances against their sums over all odd sets."""
    from copra_llm.shapley.surrogate import FLAT

    law = Prior(n, decay)
    coalitions, functions, sets = walsh(n)
    variance = np.array([decay ** (len(t) - 1) + FLAT * (len(t) == 1) for t in sets])
    to_shapley = np.array([[2 / len(t) if i in t else 0.0 for t in sets] for i in range(n)])  # (n, functions)
    np.testing.assert_allclose(law.covariance(coalitions, coalitions), functions * variance @ functions.T, atol=1e-9)
    np.testing.assert_allclose(law.with_shapley(coalitions), functions * variance @ to_shapley.T, atol=1e-9)
    np.testing.assert_allclose(law.shapley_variance, (to_shapley**2 @ variance), atol=1e-9)
    by_size = sum(law.with_shapley(coalitions, s) for s in range(1, n // 2 + 1))
    grand = functions * variance @ functions[-1] * 2 / n
    np.testing.assert_allclose(by_size + grand[:, None], law.with_shapley(coalitions), atol=1e-9)


def test_the_posterior_mean_leaves_one_out_as_it_should():
    """What `adjusted` reads off the inverse is the prediction of a value from all others, fitted anew."""
    n, law = 6, Prior(6, 0.4)
    halves = np.array(list(itertools.islice(pairs(n, 0), 15)))
    coalitions = with_complements(halves)
    halves, g = with_grand_pair((0.0, 1.0), coalitions, dense(n)(coalitions))
    factor = law.cholesky(halves)
    inverse = np.linalg.inv(factor @ factor.T)
    left_out = (inverse @ g) / np.diag(inverse)
    for j in (1, 8, 15):
        others = np.arange(len(g)) != j
        weights = np.linalg.solve(law.covariance(halves[others], halves[others]), g[others])
        prediction = law.covariance(halves[j : j + 1], halves[others])[0] @ weights
        assert left_out[j] == pytest.approx(g[j] - prediction, abs=1e-4)  # the jitter, times the condition


def test_the_chosen_coalitions_tell_more_than_drawn_ones():
    n, law = 12, Prior(12, 0.1)
    pool = np.array(list(itertools.islice(pairs(n, 0), 400)))
    full = np.ones((1, n), dtype=bool)
    chosen = pool[most_telling(law, full, pool, 60)]
    assert len(np.unique(chosen, axis=0)) == 60

    def variance(halves: np.ndarray) -> float:
        """Of a Shapley value, with the data's scale taken out: it is the design that is looked at."""
        factor = law.cholesky(np.vstack([full, halves]))
        known = np.linalg.solve(factor, law.with_shapley(np.vstack([full, halves])))
        return float(np.mean(law.shapley_variance - (known**2).sum(0)))

    assert variance(chosen) < variance(pool[:60]) / 2
    one = pool[most_telling(law, full, pool, 1)]  # the first choice is the best of all
    assert variance(one) <= min(variance(row[None]) for row in pool) * (1 + 1e-9)
    assert posterior(law, pool[:60], smooth(n)(pool[:60]))[2].min() >= 0


# --- evenness ---------------------------------------------------------------------------------------------


def test_evenness():
    assert top_third_share(np.ones(12)) == pytest.approx(1 / 3) and gini(np.ones(12)) == 0
    assert top_third_share(np.ones(10)) == pytest.approx(1 / 3)  # 3 players and a third of the fourth
    one = np.eye(8)[3]
    assert top_third_share(one) == 1 and gini(one) == pytest.approx(7 / 8)
    values = np.array([6.0, 3.0, 2.0, 1.0])
    assert top_third_share(values) == pytest.approx((6 + 3 / 3) / 12)
    assert gini(values) == pytest.approx(2 * (3 + 4 + 5 + 1 + 2 + 1) / (2 * 4 * 12))
    assert gini(-values) == gini(values) and top_third_share(values * [1, -1, 1, -1]) == top_third_share(values)
    assert math.isnan(gini(np.zeros(3))) and math.isnan(top_third_share(np.zeros(3)))


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: exact(glove, 17), "17 players.*up to 16.*group the players"),
        (lambda: approximate(glove, 17, budget=10**6, estimator="exact"), "up to 16"),
        (lambda: approximate(glove, 10, budget=100, estimator="exact"), "1024 evaluations.*100"),
        (lambda: approximate(glove, 10, budget=12), "budget of 12.*quadrature with 10 players; give at least 24"),
        (lambda: approximate(glove, 4, budget=7), "give at least 12"),
        (lambda: approximate(glove, 10, budget=20, estimator="owen"), "give at least 57"),
        (lambda: approximate(glove, 20, budget=10_001), "at most 10000, or take stratified"),
        (lambda: approximate(glove, 10, budget=99, estimator="kernel"), '"kernel", but must be one of exact, perm'),
        (lambda: approximate(glove, 10, budget=99, estimator="quadratur"), 'did you mean "quadrature"'),
        (lambda: approximate(glove, 10, budget=99, estimator=Permutation), "is no estimator"),
        (lambda: approximate(glove, 10, budget=99, seed=-1), "seed is -1"),
        (lambda: approximate(glove, 10, budget=99, batch_size=0), "batch size is 0"),
        (lambda: approximate(glove, 0, budget=99), "0 players"),
        (lambda: Owen(nodes="trapezoid"), "trapezoid"),
        (lambda: approximate(lambda c: glove(c)[:1], 10, budget=99), "one value a coalition"),
        (lambda: approximate(lambda c: glove(c) / c.any(1), 10, budget=99), "coalition 0000000000 is nan"),
        (lambda: approximate(glove, 10, budget=99, cache=CoalitionCache(9)), "cache is of 9 players"),
        (lambda: CoalitionCache(3, [("01", 1.0)]), '"01" is not one of 3 players'),
        (lambda: CoalitionCache(3, [("012", 1.0)]), '"012"'),
        (lambda: CoalitionCache(3, [("011", float("inf"))]), "011 is inf"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_bad_input_is_refused_with_the_remedy(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
