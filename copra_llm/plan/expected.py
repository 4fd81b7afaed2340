"""How much of an adapter takes part in a step, on average over a run?

With L players, mask law of `masks.py`, and p the activation probability of a step:

    share of active players       p / (1 - (1 - p)^L)
    P(the lowest k are inactive)  ((1 - p)^k - (1 - p)^L) / (1 - (1 - p)^L),      (L - k) / L at p = 0

The second says how deep the backward pass goes: autograd stops at the lowest active player, so a block with k players
below its top is reached unless these k are inactive, all of them.

Source: CopRA (arXiv 2410.22911), equation 2, and the condition of at least one active layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from copra_llm.masks import marginal_prob
from copra_llm.schedule import Schedule


@dataclass(frozen=True)
class Participation:
    """Means over the steps of a run, each in (0, 1]."""

    active: float
    """Share of the players that are active."""
    reached: float
    """Share of the blocks that the backward pass reaches."""


def lowest_inactive_prob(p: float, num_players: int, k: int) -> float:
    """P(none of the lowest k of `num_players` is active), under the law conditioned on at least one active."""
    if p == 0.0:
        return (num_players - k) / num_players
    if p == 1.0:
        return float(k == 0)
    stay = math.log1p(-p)
    # (q^k - q^L) / (1 - q^L), q = 1 - p, without the cancellation at small p.
    return math.exp(k * stay) * math.expm1((num_players - k) * stay) / math.expm1(num_players * stay)


def participation(schedule: Schedule, players_of_block: Sequence[int], steps: int) -> Participation:
    """What takes part in a run of `steps` optimizer steps.

    Args:
        schedule: p(t).
        players_of_block: number of players in each block that holds any, from the lowest up; all 1 at granularity
            "layer".
        steps: optimizer steps T; long runs are read at 1000 of them, evenly spaced.
    """
    num_players, points = sum(players_of_block), min(steps, 1000)
    tops = [sum(players_of_block[: i + 1]) for i in range(len(players_of_block))]
    active = reached = 0.0
    for i in range(points):
        p = schedule(i / points)
        active += marginal_prob(p, num_players)
        reached += 1.0 - sum(lowest_inactive_prob(p, num_players, top) for top in tops) / len(tops)
    return Participation(active / points, reached / points)
