"""What is the adapter worth in some of the layers alone?

    v(S) = -loss [nats]  or  accuracy [percent]      on a held-out split, the adapter acting in the players of S only

A player is a transformer block, a single adapted module, or a group of consecutive ones; v(all players) is the
whole adapter's value and v(no player) that of the base model (with what is never gated: heads, adapters outside
blocks). A higher value is better under both metrics. Coalitions share what they have in common
(`copra_llm.prefixes`); where a model does not allow that, each is evaluated by itself.

Source: CopRA (arXiv 2410.22911), section 3.3 and equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from copra_llm.adapters import AdapterWeights
from copra_llm.batches import EncodedSplit, eval_loader
from copra_llm.errors import InputError
from copra_llm.evaluate import evaluate, scoring
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.gates import LayerGates
from copra_llm.prefixes import NotShareable, SharedBlocks

METRICS = ("loss", "accuracy")
PROBE_EXAMPLES = 4
"""Examples on which sharing is compared with the plain way before it is used."""


@dataclass(frozen=True)
class Outcomes:
    """Every example's outcome under every coalition."""

    correct: np.ndarray
    """bool `(n_coalitions, n_examples)`."""
    nll: np.ndarray
    """-log softmax(scores)[gold] in nats, float64 `(n_coalitions, n_examples)`."""

    def values(self, metric: str) -> np.ndarray:
        """v `(n_coalitions,)`: minus the mean loss in nats, or the accuracy in percent."""
        return -self.nll.mean(1) if metric == "loss" else 100.0 * self.correct.mean(1)


class CoalitionGame:
    """An adapter on one task as a cooperative game: `game(coalitions (n, n_players)) -> values (n,)`.

    Args:
        evaluator: the model and the split.
        weights: the adapter.
        task: one of the evaluator's.
        metric: "loss" (v is minus the loss, in nats) or "accuracy" (percent).
        granularity: "layer" or "module".
        layer_pattern: as for `LayerGates`.
        n_groups: join consecutive players into so many groups of (nearly) equal size; None: each plays alone.
        examples: indices of the split's examples to use; None: all.
        batch_size: examples a forward pass takes; None: the evaluator's.
        pack: coalitions side by side in one pass. With 1 every value is bit for bit that of the plain way
            (`plain_outcomes`); with more, matrix products have other shapes and add in another order, so scores
            differ by their rounding. It pays where a batch of examples does not fill the machine.
        share: False takes the plain way.

    Raises:
        InputError: for an unknown metric or granularity, groups that cannot be, or an adapter without layers.
    """

    def __init__(
        self,
        evaluator: AdapterEvaluator,
        weights: AdapterWeights,
        task: str,
        *,
        metric: str = "loss",
        granularity: str = "layer",
        layer_pattern: str | None = None,
        n_groups: int | None = None,
        examples: Sequence[int] | None = None,
        batch_size: int | None = None,
        pack: int = 1,
        share: bool = True,
    ):
        if metric not in METRICS:
            raise InputError(f'the metric is "{metric}", but must be one of {", ".join(METRICS)}')
        self.evaluator, self.weights, self.metric = evaluator, weights, metric
        self.granularity, self.n_groups = granularity, n_groups
        evaluator.attach(weights)
        self.classifier = evaluator.bench.classifier
        self._model = self.classifier.model
        self.gates = LayerGates(self._model, granularity, layer_pattern)
        self.groups = consecutive_groups(self.gates.num_layers, n_groups)
        self.players = [group_name([self.gates.keys[i] for i in group]) for group in self.groups]
        split = evaluator.bench.splits[evaluator.split][task]
        self.split = split if examples is None else take(split, examples)
        self.batch_size = batch_size or evaluator.batch_size
        self.note: str | None = None
        """Why less is shared than was asked for, where it is."""
        self.evaluations = 0
        """Coalitions evaluated so far."""
        self._shared = self._checked_sharing(pack) if share else None

    @property
    def n_players(self) -> int:
        return len(self.players)

    @property
    def pack(self) -> int:
        """Coalitions side by side in one pass."""
        return self._shared.pack if self._shared else 1

    @property
    def blocks_computed(self) -> int:
        """Runs of a block for one batch and one prefix so far; 0 on the plain way."""
        return self._shared.computed if self._shared else 0

    def __call__(self, coalitions: np.ndarray) -> np.ndarray:
        """Values `(n,)` of `coalitions (n, n_players)`, bool."""
        return self.outcomes(coalitions).values(self.metric)

    def outcomes(self, coalitions: np.ndarray) -> Outcomes:
        """Every example's outcome under `coalitions (n, n_players)`, bool."""
        masks = self.masks(coalitions)
        self._attach()
        self.evaluations += len(masks)
        if self._shared is None:
            return self._plain(masks)
        order = self._shared.order(masks)
        sorted_outcomes = self._walk(self._shared, masks[order], self.split, self.batch_size)
        back = np.argsort(order)
        return Outcomes(sorted_outcomes.correct[back], sorted_outcomes.nll[back])

    def plain_outcomes(self, coalitions: np.ndarray) -> Outcomes:
        """The same, each coalition by itself: what `outcomes` must equal."""
        self._attach()
        return self._plain(self.masks(coalitions))

    def masks(self, coalitions: np.ndarray) -> np.ndarray:
        """Gates `(n, num_layers)` of `coalitions (n, n_players)`."""
        coalitions = np.asarray(coalitions, dtype=bool)
        if coalitions.ndim != 2 or coalitions.shape[1] != self.n_players:
            raise ValueError(f"coalitions have the shape {coalitions.shape}, but must be (n, {self.n_players})")
        return np.repeat(coalitions, [len(group) for group in self.groups], axis=1)

    def order(self, coalitions: np.ndarray) -> np.ndarray:
        """The order `(n,)` in which neighbours have most in common, for evaluating a long list in parts."""
        if self._shared is None:
            return np.arange(len(coalitions))
        return self._shared.order(self.masks(coalitions))

    def _attach(self) -> None:
        """The evaluator may have taken up another adapter since."""
        self.evaluator.attach(self.weights)
        if self.classifier.model is not self._model:
            raise ValueError("the evaluator has replaced its model since this game was made; make the game anew")

    def _plain(self, masks: np.ndarray) -> Outcomes:
        found = []
        for mask in masks:
            with self.gates.applied(mask):
                found.append(evaluate(self.evaluator.accelerator, self.classifier, self.split, self.batch_size))
        n = len(self.split)
        return Outcomes(
            np.array([f.correct for f in found], dtype=bool).reshape(-1, n),
            np.array([f.nll for f in found]).reshape(-1, n),
        )

    def _walk(self, shared: SharedBlocks, masks: np.ndarray, split: EncodedSplit, batch_size: int) -> Outcomes:
        """`masks` in the order of the walk; one batch of examples after another is taken through all of them."""
        correct = np.zeros((len(masks), len(split)), dtype=bool)
        nll = np.zeros((len(masks), len(split)))
        with scoring(self.evaluator.accelerator, self.classifier):
            for batch in eval_loader(self.classifier, split, batch_size):
                index = batch.pop("index").numpy()
                batch = self._to_device(batch)
                for i, scores in enumerate(shared.scores(batch, masks)):
                    losses, answers = self.classifier.graded(scores, batch["labels"])
                    nll[i, index] = losses.cpu().numpy() * split.scale
                    correct[i, index] = (answers == batch["labels"]).cpu().numpy()
        return Outcomes(correct, nll)

    def _checked_sharing(self, pack: int) -> SharedBlocks | None:
        """Sharing that gives what the plain way gives, on a few examples; None, with a note, if there is none."""
        probe = take(self.split, range(min(PROBE_EXAMPLES, len(self.split))))
        n = self.gates.num_layers
        # Each but the first shares a prefix with the one before it, of all blocks but one, of half, of none.
        masks = np.array([np.arange(n) < n, np.arange(n) < n - 1, np.arange(n) % 2 == 0, np.arange(n) < n // 2,
                          np.arange(n) < 0])  # fmt: skip
        reason = ""
        for side_by_side in sorted({pack, 1}, reverse=True):
            try:
                with scoring(self.evaluator.accelerator, self.classifier):
                    batch = next(iter(eval_loader(self.classifier, probe, len(probe))))
                    batch.pop("index")
                    batch = self._to_device(batch)
                    apart = getattr(self.classifier, "apart", ())
                    shared = SharedBlocks(self._model, self.gates, self._run, batch, side_by_side, apart)
                    walked = masks[shared.order(masks)]
                    found = torch.stack(shared.scores(batch, walked))
                    plain = []
                    for mask in walked:
                        with self.gates.applied(mask):
                            plain.append(self._run(dict(batch)))
                    reference = torch.stack(plain)
            except NotShareable as error:
                reason = str(error)
                continue
            if _agree(found, reference, None if shared.pack == 1 else self._precision()):
                shared.computed = 0
                if shared.pack < pack:
                    self.note = (
                        f"one coalition a pass instead of {pack}: {reason or 'a cache, or several rows an example'}"
                    )
                return shared
            reason = "it changed this model's scores"
        self.note = f"every coalition is evaluated by itself, for hidden states cannot be shared: {reason}"
        return None

    def _precision(self) -> float:
        """The coarsest machine epsilon among the model's numbers."""
        return max(torch.finfo(p.dtype).eps for p in self._model.parameters() if p.is_floating_point())

    def _run(self, batch: dict) -> torch.Tensor:
        return self.classifier(batch, scores=True)

    def _to_device(self, batch: dict) -> dict:
        device = self.evaluator.accelerator.device
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def consecutive_groups(n: int, n_groups: int | None) -> list[list[int]]:
    """`n` players in order as `n_groups` groups of nearly equal size; None: each by itself.

    Raises:
        InputError: if there are fewer players than groups, or no group.
    """
    if n_groups is None:
        return [[i] for i in range(n)]
    if not 1 <= n_groups <= n:
        raise InputError(f"{n_groups} groups were asked for, but the adapter has {n} players; ask for 1 to {n}")
    return [group.tolist() for group in np.array_split(np.arange(n), n_groups)]


def group_name(keys: list[str]) -> str:
    """A player's name: its key, or the first and the last of its group."""
    return keys[0] if len(keys) == 1 else f"{keys[0]} to {keys[-1]}"


def take(split: EncodedSplit, examples: Sequence[int]) -> EncodedSplit:
    """Some examples of a split, by their indices."""
    examples = list(examples)
    return replace(
        split,
        encoded=[split.encoded[i] for i in examples],
        labels=[split.labels[i] for i in examples],
        lengths=split.lengths[examples],
        targets=None if split.targets is None else split.targets[examples],
    )


def _agree(found: torch.Tensor, reference: torch.Tensor, eps: float | None) -> bool:
    """Bit for bit, or up to rounding in arithmetic of precision `eps`."""
    if eps is None:
        return torch.equal(found, reference)
    # Rounding stays below the square root of the precision; a row of another coalition lies above.
    return bool((found - reference).abs().max() <= eps**0.5 * reference.abs().max())
