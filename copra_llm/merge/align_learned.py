"""LoRA-align with a learned P: the paper's objective, by gradient descent.

    min over invertible P of  ||B_1 - B_2 P||_F + ||A_1 - P^-1 A_2||_F,        P = U diag(exp(d)) V^T
    U = U_0 (1 - X')^-1 (1 + X'),  X' = X - X^T  (Cayley's form of a rotation);  V likewise by Y
    X = Y = d = 0 is the orthogonal P of align.py

In its SVD form P stays invertible and its inverse costs nothing. The norms depend on B_1, B_2 only through the
triangular factor of [B_1, B_2], and so do those of A, so a step works on matrices of 2r rows, whatever the
layer's size. L-BFGS with a strong Wolfe line search; nothing is random. The result is never worse than the closed
form by this objective. The true gap may be: the objective does not weigh the one norm by the other.

Source: CopRA (arXiv 2410.22911), section 3.1, equation 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from copra_llm.adapters import LoraFactors
from copra_llm.merge.align import Pair, fuse_aligned, procrustes


def align_learned(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    steps: int = 100,
    pad: str | None = None,
    note=None,
) -> LoraFactors:
    """Align one module's factors by learned matrices, then fuse them.

    Args:
        factors: one module's, of equal ranks without `pad`.
        weights: one for each adapter, summing to 1.
        steps: of L-BFGS, at most.
        pad: "zero" to fill smaller ranks up with zeros.
        note: as in `copra_llm.merge.align.align`.

    Raises:
        InputError: if the ranks differ and `pad` is None, or the first scaling is 0.
    """

    def solve(first: Pair, other: Pair) -> Tensor:
        return learn(first, other, steps)

    return fuse_aligned(factors, weights, solve, "align-learned", pad, note)


def learn(first: Pair, other: Pair, steps: int = 100) -> Tensor:
    """The `P (r, r)` with a small `||B_1 - B_2 P|| + ||A_1 - P^-1 A_2||`, at most the closed form's."""
    (a1, b1), (a2, b2) = first, other
    r = len(a1)
    left, right = (torch.linalg.qr(torch.cat(pair, 1), mode="r")[1] for pair in ((b1, b2), (a1.T, a2.T)))
    (left1, left2), (right1, right2) = left.split(r, 1), right.split(r, 1)  # (at most 2r, r) each
    start = procrustes(first, other)
    U0, _, V0h = torch.linalg.svd(start)
    one = torch.eye(r, dtype=torch.float64)
    free = torch.zeros(2 * r * r + r, dtype=torch.float64, requires_grad=True)  # X, Y and d in one row

    def parts() -> tuple[Tensor, Tensor]:
        XY, stretch = free[: 2 * r * r].view(2, r, r), free[2 * r * r :].exp()
        skew = XY - XY.mT
        turn = torch.linalg.solve(one - skew, one + skew)  # (2, r, r)
        U, V = U0 @ turn[0], V0h.T @ turn[1]
        return (U * stretch) @ V.T, (V / stretch) @ U.T

    def objective(P: Tensor, inverse: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(left1 - left2 @ P) + torch.linalg.matrix_norm(right1 - right2 @ inverse.T)

    optimizer = torch.optim.LBFGS(
        [free], max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(*parts())
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        P, inverse = parts()
        value, first_value = objective(P, inverse), objective(start, start.T)
    # Not where two adapters agree already: a norm of 0 has no gradient.
    return P if value.isfinite() and value < first_value else start
