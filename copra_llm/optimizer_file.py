"""How is an optimizer's state kept in a file that cannot run code?

    optimizer.safetensors: "<parameter>.<name>" -> tensor,    parameters counted through all groups

Rates and the like are not kept: they are functions of settings and step, which whoever resumes makes again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save

from copra_llm.errors import InputError, shown
from copra_llm.tensor_file import read_tensors

OPTIMIZER = "optimizer.safetensors"
_ANEW = "give another checkpoint, or start anew elsewhere"


def write_optimizer(state: dict, folder: Path) -> None:
    """Write an optimizer's `state_dict`: the state of every parameter that has taken a step."""
    own = {f"{i}.{name}": tensor for i, named in state["state"].items() for name, tensor in named.items()}
    tensors = {key: tensor.contiguous() for key, tensor in own.items()}
    # By way of memory: where the disk is full, safetensors' own writer raises an error without the file's name.
    (folder / OPTIMIZER).write_bytes(save(tensors))


def read_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Give an optimizer the state that one of the same parameters has written.

    Raises:
        InputError: if the file is torn, or of an optimizer of other parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    tensors, _ = read_tensors(folder / OPTIMIZER)
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        if not (number.isdecimal() and len(number) < 10 and int(number) < len(parameters)):
            raise InputError(f"{folder / OPTIMIZER} holds {shown(key)}, which is none of this run's {len(parameters)} "
                             f"parameters; {_ANEW}")  # fmt: skip
        expected = _MOMENTS.get(name, parameters[int(number)].shape)
        if tensor.shape != expected or not tensor.is_floating_point():
            raise InputError(f"{folder / OPTIMIZER}: {key} has shape {tuple(tensor.shape)} and type {tensor.dtype}, "
                             f"but must be floating-point numbers of shape {tuple(expected)}; {_ANEW}")  # fmt: skip
        if name == "step" and not 0 <= float(tensor) < 2**53:
            raise InputError(f"{folder / OPTIMIZER}: {key} is {float(tensor):g}, but must be a count of steps; {_ANEW}")
        state.setdefault(int(number), {})[name] = tensor
    for number, own in state.items():
        if own.keys() != _NAMES:
            raise InputError(f"{folder / OPTIMIZER} has {', '.join(sorted(own))} for parameter {number}, but must have "
                             f"{', '.join(sorted(_NAMES))}; {_ANEW}")  # fmt: skip
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


_MOMENTS = {"step": torch.Size([])}
_NAMES = {"step", "exp_avg", "exp_avg_sq"}
"""AdamW's."""
