"""How is a sum of low-rank matrices decomposed without ever forming it?

    sum_i w_i s_i B_i A_i = B A,    B = [w_1 s_1 B_1, ..., w_n s_n B_n],    A = [A_1; ...; A_n]
    B = Q_B R_B,  A^T = Q_A R_A,  R_B R_A^T = U S V^T    =>    B A = (Q_B U) S (Q_A V)^T

Two QR decompositions of thin matrices and one SVD of a core of at most sum r_i rows and columns: an
`out x in` matrix is never formed. All of it in float64: the thin matrices are small, and the merged factors
are then off by no more than storing them.

Source: Golub and Van Loan, Matrix Computations, 4th ed., section 5.4 (the R-SVD, applied on both sides).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from copra_llm.adapters import LoraFactors


def stacked(factors: Sequence[LoraFactors], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """`B (out, sum r)` and `A (sum r, in)` in float64 with `B @ A = sum_i w_i Delta W_i`."""
    lora_B = torch.cat([(w * f.scaling) * f.lora_B.double() for f, w in zip(factors, weights, strict=True)], dim=1)
    return lora_B, torch.cat([f.lora_A.double() for f in factors])


def svd_of_product(lora_B: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of `B @ A`.

    Args:
        lora_B: `(out, r)`.
        lora_A: `(r, in)`.

    Returns:
        `U (out, k)`, singular values `(k,)` from large to small, `Vh (k, in)`; k = min(out, in, r).
    """
    q_B, r_B = torch.linalg.qr(lora_B)  # (out, min(out, r)), (min(out, r), r)
    q_A, r_A = torch.linalg.qr(lora_A.T)  # (in, min(in, r)), (min(in, r), r)
    U, S, Vh = torch.linalg.svd(r_B @ r_A.T, full_matrices=False)
    return q_B @ U, S, Vh @ q_A.T


def norm_of_product(lora_B: Tensor, lora_A: Tensor) -> float:
    """Frobenius norm of `B @ A`, exact also where the product nearly cancels."""
    r_B, r_A = torch.linalg.qr(lora_B, mode="r")[1], torch.linalg.qr(lora_A.T, mode="r")[1]
    return float(torch.linalg.matrix_norm(r_B @ r_A.T))


def support(singular_values: Tensor, *shape: int) -> int:
    """How many singular values `(k,)`, from large to small, of a matrix of that shape are not rounding alone."""
    if not len(singular_values):
        return 0
    tolerance = singular_values[0] * max(shape) * torch.finfo(singular_values.dtype).eps
    return int((singular_values > tolerance).sum())


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns `(rows, columns)`: `P W^T` of the SVD `P D W^T`.

    Where columns depend on each other, directions without a singular value are left out, so that the result
    does not hang on how rounding completes them.
    """
    q, r = torch.linalg.qr(matrix)
    P, D, Wh = torch.linalg.svd(r, full_matrices=False)
    k = support(D, *matrix.shape)
    return q @ (P[:, :k] @ Wh[:k])


def balanced(U: Tensor, S: Tensor, Vh: Tensor, like: LoraFactors) -> LoraFactors:
    """Factors of `U @ diag(S) @ Vh` with the singular values' roots on both sides, scaling 1, in the dtype of `like`.

    Equal norms on both sides lose least when they are stored in half precision.
    """
    root = S.sqrt()
    return LoraFactors((root[:, None] * Vh).to(like.lora_A.dtype), (U * root).to(like.lora_B.dtype), 1.0)


def cut(lora_B: Tensor, lora_A: Tensor, rank: int, like: LoraFactors, note=None) -> LoraFactors:
    """The best approximation of `B @ A` in the Frobenius norm that has at most `rank`, in the dtype of `like`."""
    U, S, Vh = svd_of_product(lora_B, lora_A)
    if note is not None:
        note(lost=float(torch.linalg.vector_norm(S[rank:])), whole=float(torch.linalg.vector_norm(S)))
    return balanced(U[:, :rank], S[:rank], Vh[:rank], like)
