"""Core Space: merge in the smallest space that holds all adapters, by any rule.

    U_B: left singular vectors of [B_1, ..., B_n]      V_A: right singular vectors of [A_1; ...; A_n]
    M_i = U_B^T Delta W_i V_A        (at most sum r_i rows and columns; nothing is lost)
    Delta W = U_B M V_A^T,      M = inner rule (M_1, ..., M_n)

A linear inner rule gives what it gives on Delta W; TIES and DARE work on the M_i entry by entry, where they are
cheap and see the adapters in one basis. Scalings are taken into the B_i.

Source: Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space (arXiv 2509.17786), section 4.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from copra_llm.adapters import LoraFactors
from copra_llm.errors import InputError
from copra_llm.merge.dare import dare, dare_ties
from copra_llm.merge.iso_c import isotropic
from copra_llm.merge.lowrank import cut, support
from copra_llm.merge.task_arithmetic import add
from copra_llm.merge.ties import ties
from copra_llm.merge.tsv_m import task_singular_vectors

INNER: dict[str, Callable[..., LoraFactors]] = {
    "task-arithmetic": add,
    "ties": ties,
    "dare": dare,
    "dare-ties": dare_ties,
    "iso-c": isotropic,
    "tsv-m": task_singular_vectors,
}
"""Names of `--inner`."""


def in_core(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    inner: str = "ties",
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    module: str = "",
    note=None,
) -> LoraFactors:
    """Merge one module's factors.

    Args:
        factors: one module's, of any ranks.
        weights: one for each adapter, as the inner rule wants them.
        inner: a key of `INNER`.
        density: the inner rule's; None: its default.
        rank: cut the result to it; None: at most `sum_i r_i`, nothing is lost.
        seed: the inner rule's.
        module: the module's name, for the inner rule's masks.
        note: gets what cutting lost.

    Raises:
        InputError: if the inner rule has no density and one was given.
    """
    takes = inspect.signature(INNER[inner]).parameters
    if density is not None and "density" not in takes:
        raise InputError(f"--density is {density:g}, but the inner rule {inner} has none; leave it out")
    wanted = {"on": "delta", "density": density, "seed": seed, "module": module}
    options = {key: value for key, value in wanted.items() if key in takes and value is not None}
    U_B, V_A, cores = to_core(factors)
    # A core as factors: B is the identity and A the core itself, so that every rule takes it.
    one = torch.eye(U_B.shape[1], dtype=torch.float64)
    merged = INNER[inner]([LoraFactors(core, one, 1.0) for core in cores], weights, **options)
    lora_B, lora_A = merged.scaling * (U_B @ merged.lora_B), merged.lora_A @ V_A.T
    return cut(lora_B, lora_A, rank or merged.r, factors[0], note if rank else None)


def to_core(factors: Sequence[LoraFactors]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`U_B (out, k)`, `V_A (in, l)` and the cores `(k, l)`, with `Delta W_i = U_B @ M_i @ V_A.T`, in float64."""
    all_B, all_A = [f.scaling * f.lora_B.double() for f in factors], [f.lora_A.double() for f in factors]
    U_B, V_A = _left_singular_vectors(torch.cat(all_B, 1)), _left_singular_vectors(torch.cat(all_A).T)
    return U_B, V_A, [(U_B.T @ b) @ (a @ V_A) for b, a in zip(all_B, all_A, strict=True)]


def _left_singular_vectors(matrix: Tensor) -> Tensor:
    """Those with a singular value, at least one: `(rows, columns)` -> `(rows, k)`."""
    q, r = torch.linalg.qr(matrix)
    U, S, _ = torch.linalg.svd(r, full_matrices=False)
    return q @ U[:, : max(1, support(S, *matrix.shape))]
