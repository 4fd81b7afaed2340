"""Which adapter layers does a model have, and how are some of them left out of a step?

    y = f(x; W_l + delta_l * Delta W_l)

A *layer* (a player of the game) is a transformer block: all its adapted modules switch together. A closed
gate takes the path that PEFT itself takes for a disabled adapter, so an inactive layer is bitwise the
frozen base layer, costs what it costs, and its parameters get no gradient at all (so no momentum and no
weight decay either). `requires_grad` is never touched, and PEFT's own `disable_adapter()` / `set_adapter()`
can be used at any time without opening a closed gate.

This is the only module that touches PEFT's internals. Source: CopRA (arXiv 2410.22911), equation 2.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from copra_llm.errors import InputError
from copra_llm.fused_linear import fused_forward, fusible
from copra_llm.shared_inputs import SharedInput, shared_inputs

GRANULARITIES = ("layer", "module")
FIRST_INTEGER = r"^(?:[^.]+\.)*?\d+(?=\.|$)"
"""Default layer pattern: the module name through its first integer component."""


class LayerGates:
    """The players of a PEFT LoRA model, and the switch that leaves some of them out.

    Args:
        model: what `get_peft_model` returned, wrapped or not.
        granularity: "layer" switches a transformer block's adapters together, "module" each alone.
        layer_pattern: regular expression; a layer's key is the module name up to the end of its match.
        fused: whether open layers are computed in one pass where that gives PEFT's values up to rounding
            (`fused_linear`).

    Raises:
        InputError: if the model has no LoRA module inside a block, or the pattern is no regular expression.

    Adapters outside blocks, `modules_to_save` and trainable tokens are no players: always on.
    """

    def __init__(
        self, model: nn.Module, granularity: str = "layer", layer_pattern: str | None = None, fused: bool = False
    ):
        modules: dict[str, list[LoraLayer]] = {}
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                modules.setdefault(base_name(name), []).append(module)
        players = group_players(modules, granularity, layer_pattern)
        if not players:
            raise InputError(
                "the model has no LoRA module inside a numbered transformer block, so there is no layer to "
                "switch; attach an adapter first, or give --layer_pattern"
            )
        self.keys: list[str] = list(players)
        """Player names in mask order: (tower, index)."""
        self.modules = [[module for name in names for module in modules[name]] for names in players.values()]
        """The adapted modules of each player."""
        self.fused = fused
        self.shared: list[SharedInput] = []
        """Layers that are computed together while all of them are open; see `find_shared_inputs`."""
        self._shared_by: dict[int, SharedInput] = {}
        self._held: list[_Switched] = []

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    def player_of(self) -> dict[int, int]:
        """The player of every parameter of its modules, by the parameter's `id`; what is always on is not there."""
        return {id(p): i for i, modules in enumerate(self.modules) for module in modules for p in module.parameters()}

    def find_shared_inputs(self, run: Callable[[], object]) -> None:
        """See which modules take the same input, so that they are computed together from then on.

        Args:
            run: a forward pass of the model, with every gate open.
        """
        fusibles = [module for modules in self.modules for module in modules if self.fused and fusible(module)]
        self.shared = shared_inputs(fusibles, run) if fusibles else []
        self._shared_by = {id(module): shared for shared in self.shared for module in shared.modules}

    @contextmanager
    def applied(self, mask: Sequence[bool], scales: Sequence[float] | None = None) -> Iterator[None]:
        """Close the gates where `mask (num_layers,)` is False; every gate is open again afterwards.

        Where `scales (num_layers,)` are given, each open layer's update is multiplied with its own. Forward, backward
        and (for activation checkpointing, which runs forward again) everything between belong inside.
        """
        switched = self._switched(mask)
        try:
            _switch(switched)
            with self._scaled(mask, scales):
                yield
        finally:
            self._restore(switched)

    def apply(self, mask: Sequence[bool]) -> None:
        """Close the gates where `mask (num_layers,)` is False, until `lift` or the next mask.

        For a loop that belongs to somebody else and into which no block can be put; elsewhere `applied` is safer.
        """
        self.lift()
        self._held = self._switched(mask)
        _switch(self._held)

    def lift(self) -> None:
        """Undo what `apply` has done."""
        self._restore(self._held)
        self._held = []

    def _switched(self, mask: Sequence[bool]) -> list[_Switched]:
        """The modules that `mask` changes."""
        if len(mask) != self.num_layers:
            raise ValueError(f"the mask has {len(mask)} entries for {self.num_layers} layers")
        switched = []
        for modules, active in zip(self.modules, mask, strict=True):
            for module in modules:
                if not active:
                    switched.append(_Switched(module, type(module), _closed_class(type(module)), None))
                elif self.fused and fusible(module):
                    shared = self._shared_by.get(id(module))
                    switched.append(_Switched(module, type(module), _fused_class(type(module)), shared))
        return switched

    @contextmanager
    def _scaled(self, mask: Sequence[bool], scales: Sequence[float] | None) -> Iterator[None]:
        layers = zip(self.modules, mask, scales, strict=True) if scales is not None else ()
        changed = [(module, module.scaling, scale) for modules, active, scale in layers if active for module in modules]
        try:
            for module, scaling, scale in changed:
                # Another dictionary in its place, so that the true scalings come back as they were.
                module.scaling = {name: value * scale for name, value in scaling.items()}
            yield
        finally:
            for module, scaling, _ in changed:
                module.scaling = scaling

    def _restore(self, switched: list[_Switched]) -> None:
        for module, before, _, shared in switched:
            object.__setattr__(module, "__class__", before)
            if shared is not None and not getattr(before, "is_fused", False):
                vars(module).pop(_SHARED, None)
        for shared in self.shared:
            shared.forget()


def group_players(
    names: Iterable[str], granularity: str = "layer", layer_pattern: str | None = None
) -> dict[str, list[str]]:
    """Which player does each adapted module belong to, and in which order do the players stand?

    Args:
        names: of adapted modules in the base model.
        granularity: "layer" puts a transformer block's modules together, "module" leaves each alone.
        layer_pattern: regular expression; a layer's key is the module name up to the end of its match.

    Returns:
        The players' keys in mask order, (tower, index), with the modules of each as they came. Modules outside
        blocks are left out: they belong to no player.

    Raises:
        InputError: if the granularity is unknown or the pattern no regular expression.
    """
    if granularity not in GRANULARITIES:
        raise InputError(f"granularity is {granularity!r}, but must be one of {', '.join(GRANULARITIES)}")
    try:
        pattern = re.compile(layer_pattern or FIRST_INTEGER)
    except re.error as error:
        raise InputError(f"--layer_pattern is {layer_pattern!r}, which is no regular expression: {error}") from None
    players: dict[tuple, tuple[str, list[str]]] = {}
    for name in names:
        match = pattern.search(name)
        if match is not None:
            layer = name[: match.end()]
            key = layer if granularity == "layer" else name
            players.setdefault((_natural(layer), _natural(key)), (key, []))[1].append(name)
    return dict(players[order] for order in sorted(players))


def base_name(name: str) -> str:
    """A module's name in the base model: without the prefixes of PEFT, DDP and `torch.compile`."""
    return re.sub(r"^(?:module\.|_orig_mod\.)*(?:.*?base_model\.model\.)?", "", name)


class Part:
    """A part of a model, of which it is asked again and again where it is not the frozen base model.

    Its modules are listed once, and anew when one of them was exchanged; gates, flags and values are read each time.

    Args:
        modules: gives the part's modules by name, as they are in the model now.
    """

    def __init__(self, modules: Callable[[], dict[str, nn.Module]]):
        self._modules = modules
        self._tree: list[tuple[dict, list]] = []
        self._named: dict[str, nn.Module] = {}
        self._wrapped: dict[str, BaseTunerLayer | AuxiliaryTrainingWrapper] = {}
        self._bare: dict[str, nn.Module] = {}

    def named_modules(self) -> dict[str, nn.Module]:
        """All modules by name; not to be changed."""
        now = self._modules()
        if not self._tree or any(list(held.values()) != then for held, then in [(now, self._tree[0][1]), *self._tree]):
            self._list(now)
        return self._named

    def acting(self) -> dict[str, list[Tensor]]:
        """The parameters that make the difference, by the name of the module that they belong to: those of adapters
        that no closed gate and no flag of PEFT's switches off, and trained ones of the base itself."""
        self.named_modules()
        found = {name: _own_parameters(module) for name, module in self._wrapped.items() if _acts(module)}
        trained = {name: [p for p in _direct(module) if p.requires_grad] for name, module in self._bare.items()}
        return found | {name: own for name, own in trained.items() if own}

    def state(self) -> str | None:
        """A name for what the adapters do now, to tell it from all else they may do.

        Closed gates, PEFT's own flag, which adapters are active, their scalings and the values of what is trained
        count. Values are read, not their versions: who writes to `parameter.data` leaves no other trace.

        Returns:
            "" where nothing acts, else 32 hexadecimal digits; None if the values are not all here to be read (sharded
            over processes).
        """
        found = self.acting()
        if not found:
            return ""
        digest = hashlib.sha256()
        for name in found:
            module = self._named[name]
            settings = [getattr(module, key, None) for key in ("active_adapters", "merged_adapters", "scaling")]
            digest.update(repr((name, settings)).encode())
        values = [value.detach() for own in found.values() for value in own]
        # ZeRO-3 leaves empty tensors, FSDP those of which each process has a piece.
        if any(value.numel() == 0 or hasattr(value, "placements") for value in values):
            return None
        raw = torch.cat([value.contiguous().reshape(-1).view(torch.uint8) for value in values])
        digest.update(raw.cpu().numpy().tobytes())
        return digest.hexdigest()[:32]

    def frozen(self) -> list[Tensor]:
        """The parameters that are not trained."""
        return [p for module in self.named_modules().values() for p in _direct(module) if not p.requires_grad]

    def _list(self, modules: dict[str, nn.Module]) -> None:
        self._named = {name: m for part, top in modules.items() for name, m in top.named_modules(prefix=part)}
        self._tree = [(modules, list(modules.values()))]
        self._tree += [(module._modules, list(module._modules.values())) for module in self._named.values()]
        self._wrapped = {name: m for name, m in self._named.items() if isinstance(m, _WRAPPERS)}
        adapters = {id(below) for m in self._wrapped.values() for name, below in m.named_modules()
                    if not f"{name}.".startswith(_BASE_WEIGHTS)}  # fmt: skip
        self._bare = {name: m for name, m in self._named.items() if id(m) not in adapters}


def _own_parameters(wrapper: BaseTunerLayer | AuxiliaryTrainingWrapper) -> list[Tensor]:
    """The parameters that a wrapped module has beside the weights of the module it wraps."""
    return [p for key, p in wrapper.named_parameters() if not key.startswith(_BASE_WEIGHTS)]


def _direct(module: nn.Module) -> list[Tensor]:
    """A module's own parameters, without those of modules below it."""
    return [p for p in module._parameters.values() if p is not None]


_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
_BASE_WEIGHTS = ("base_layer.", "original_module.")
"""Where PEFT keeps the frozen weights of a module that it has wrapped."""


def _acts(module: BaseTunerLayer | AuxiliaryTrainingWrapper) -> bool:
    """Whether a wrapped module's forward pass is not that of the module it wraps."""
    if getattr(type(module), "gate_is_closed", False) or module.disable_adapters:
        return False
    return bool(module.merged_adapters) or bool(set(module.active_adapters) & set(module._get_available_adapters()))


def foreign_adapters(model: nn.Module) -> list[str]:
    """Names of the adapted modules that no gate can leave out of a step: adapters of another kind than LoRA.

    AdaLoRA is among them: its loss has a term in every layer's factors, so an inactive layer would move. Trainable
    tokens are not: like `modules_to_save`, they are no players.
    """
    own = (LoraLayer, TrainableTokensLayer)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and (isinstance(module, AdaLoraLayer) or not isinstance(module, own))
    ]


class _Switched(NamedTuple):
    """A module, its class as it is now, the one for the time of a mask, and with whom it is computed then."""

    module: LoraLayer
    before: type
    during: type
    shared: SharedInput | None


def _switch(modules: Iterable[_Switched]) -> None:
    for module, _, during, shared in modules:
        # Not through nn.Module.__setattr__, which looks for parameters first.
        object.__setattr__(module, "__class__", during)
        if shared is not None:
            vars(module)[_SHARED] = shared


_SHARED = "_copra_shared_input"
"""Where a module has its `SharedInput` for the time of a mask."""


@functools.cache
def _closed_class(cls: type[LoraLayer]) -> type[LoraLayer]:
    """`cls` with its gate closed.

    Every PEFT LoRA layer (linear, quantised, embedding, convolution, DoRA) asks its flag which way to go. A
    closed one raises that flag for the time of its own forward pass alone. So PEFT sees its flag as it left
    it: leaving `disable_adapter()` lowers the flag on every layer, and asks all of them for it before.
    """

    def __call__(self, *args, **kwargs):
        before = self._disable_adapters
        object.__setattr__(self, "_disable_adapters", True)
        try:
            return cls.__call__(self, *args, **kwargs)
        finally:
            object.__setattr__(self, "_disable_adapters", before)

    own = {"__call__": __call__, "__module__": cls.__module__, "gate_is_closed": True}
    return type(cls.__name__, (cls,), own)


@functools.cache
def _fused_class(cls: type[LoraLayer]) -> type[LoraLayer]:
    """`cls` with a forward pass in one node, for a module that was found `fusible`."""

    def forward(self, x, *args, **kwargs):
        if args or kwargs or self.disable_adapters or self.merged:
            return cls.forward(self, x, *args, **kwargs)
        shared = vars(self).get(_SHARED)
        return fused_forward(self, x) if shared is None else shared(self, x)

    own = {"forward": forward, "__module__": cls.__module__, "is_fused": True}
    return type(cls.__name__, (cls,), own)


def _natural(name: str) -> tuple:
    """Sort key under which block 2 comes before block 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))
