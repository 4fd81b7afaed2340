"""What does a safetensors file hold, and in which sentence is it refused where it holds none?

Its header has bounds on everything, so that a file can lie about its tensors only where its own bytes show it.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from copra_llm.errors import InputError


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by their keys, and its metadata.

    Raises:
        InputError: if it is no whole safetensors file, or has a tensor of a type that torch does not know.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({str(error)[:200]}); save or fetch it again"
        ) from None
