"""How much does an adapter lose when its factors are stored in fewer bits?

    int8:  q = round(127 x / max|x|)             a row of A or of B at a time,  x' = q max|x| / 127
    nf4:   q = argmin_j |x / max|x| - c_j|       64 entries at a time (row by row),  x' = c_q max|x|

with `c` the 16 values of NormalFloat. Zeros stay zeros, and quantising twice changes nothing. What comes back
is dequantised, in the adapter's own dtype, so that PEFT loads it; what the codes and their scales would take
is said beside it. Extras (DoRA magnitudes, `modules_to_save`) stay as they are.

Source of NormalFloat: QLoRA (arXiv 2305.14314), section 3 and appendix E.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from copra_llm.adapters import AdapterWeights
from copra_llm.errors import InputError, nearest

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)  # fmt: skip
"""Code values: quantiles of the normal distribution, scaled to [-1, 1], with an exact 0."""
BLOCK = 64
"""Entries that share a scale in nf4."""
SCALE_BYTES = 4
"""A scale, `max|x|`, is a float32."""


def int8(matrix: Tensor) -> Tensor:
    """`matrix (rows, columns)` rounded to 8 bits a row, dequantised to its dtype."""
    x = matrix.double()
    scale = x.abs().amax(1, keepdim=True)  # (rows, 1)
    codes = torch.round(127 * x / scale.where(scale > 0, 1.0))
    return (codes * scale / 127).to(matrix.dtype)


def int8_bytes(matrix: Tensor) -> int:
    """Of the codes, and of a scale a row."""
    return matrix.numel() + SCALE_BYTES * matrix.shape[0]


def nf4(matrix: Tensor) -> Tensor:
    """`matrix (rows, columns)` rounded to NormalFloat in blocks of 64, dequantised to its dtype."""
    n = matrix.numel()
    x = torch.nn.functional.pad(matrix.double().reshape(-1), (0, -n % BLOCK)).view(-1, BLOCK)  # (blocks, 64)
    scale = x.abs().amax(1, keepdim=True)
    values = torch.tensor(NF4, dtype=torch.float64)
    # The nearest value is found by the midpoints between neighbours; on a midpoint the lower one wins.
    codes = torch.bucketize(x / scale.where(scale > 0, 1.0), (values[1:] + values[:-1]) / 2)
    return (values[codes] * scale).reshape(-1)[:n].view(matrix.shape).to(matrix.dtype)


def nf4_bytes(matrix: Tensor) -> int:
    """Of the codes, two a byte, and of a scale a block."""
    return math.ceil(matrix.numel() / 2) + SCALE_BYTES * math.ceil(matrix.numel() / BLOCK)


KINDS = {"int8": (int8, int8_bytes), "nf4": (nf4, nf4_bytes)}
"""Names of `copra prune --quantise` -> (rounding of a matrix, bytes of what it would be stored as)."""


def quantise(weights: AdapterWeights, kind: str) -> AdapterWeights:
    """The adapter with every A and B rounded to `kind` and dequantised again.

    Raises:
        InputError: if the kind is unknown, or an entry is not finite.
    """
    rounded = _kind(kind)[0]
    factors = {}
    for name, f in weights.factors.items():
        if not (f.lora_A.isfinite().all() and f.lora_B.isfinite().all()):
            raise InputError(f"{weights.source} has an entry of {name} that is not finite, which has no place in "
                             f"{kind}; train it again at a lower rate")  # fmt: skip
        factors[name] = dataclasses.replace(f, lora_A=rounded(f.lora_A), lora_B=rounded(f.lora_B))
    return weights.with_factors(factors, f"{weights.source}, {kind}")


def quantised_bytes(weights: AdapterWeights, kind: str) -> int:
    """What the adapter's tensors would take with A and B stored as `kind`."""
    in_bytes = _kind(kind)[1]
    return sum(in_bytes(f.lora_A) + in_bytes(f.lora_B) for f in weights.factors.values()) + sum(
        tensor.nbytes for tensor in weights.extras.values()
    )


def _kind(kind: str):
    if kind not in KINDS:
        raise InputError(f'adapters are not quantised to "{kind}"{nearest(kind, KINDS)}; choose {" or ".join(KINDS)}')
    return KINDS[kind]
