"""How are several adapters made one? Weights in, weights out; no model is needed.

Each rule is a function of one module's factors in a file of its own; here is what they share: which options
a rule takes, which adapters fit together, and what the merged adapter carries along. An adapter without a module
has Delta W = 0 there.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from copra_llm.adapters import AdapterWeights, LoraFactors
from copra_llm.errors import InputError, named, nearest, shown
from copra_llm.merge.align import align
from copra_llm.merge.align_learned import align_learned
from copra_llm.merge.core_space import INNER, in_core
from copra_llm.merge.dare import dare, dare_ties
from copra_llm.merge.figures import Figures
from copra_llm.merge.fit import check_alone, check_pair
from copra_llm.merge.fusion import fuse
from copra_llm.merge.iso_c import isotropic
from copra_llm.merge.knots import tie
from copra_llm.merge.mixture import mix
from copra_llm.merge.task_arithmetic import add
from copra_llm.merge.ties import ties
from copra_llm.merge.truncated import mix_truncated
from copra_llm.merge.tsv_m import task_singular_vectors

METHODS: dict[str, Callable[..., LoraFactors]] = {
    "fusion": fuse,
    "mixture": mix,
    "truncated": mix_truncated,
    "align": align,
    "align-learned": align_learned,
    "task-arithmetic": add,
    "ties": ties,
    "dare": dare,
    "dare-ties": dare_ties,
    "knots": tie,
    "core-space": in_core,
    "iso-c": isotropic,
    "tsv-m": task_singular_vectors,
}
"""Names of `copra merge --method`; a rule's options are its keyword-only arguments."""
AVERAGES = frozenset({"fusion", "mixture", "truncated", "align", "align-learned"})
"""Their weights sum to 1, and are 1 / n by default; those of the others are 1 each, as in their papers."""
ALIKE = frozenset({"fusion", "align", "align-learned"})
"""They need equal ranks and targets, unless padded."""
LINES = AVERAGES | {"task-arithmetic"}
"""At weights (1, 0) they give the first adapter: a line between two adapters ends in the adapters themselves."""


def check_method(method: str) -> None:
    """Refuse a name that is no key of `METHODS`."""
    # A plan may hold anything where the name belongs.
    if not isinstance(method, str) or method not in METHODS:
        close = nearest(method[:100], METHODS) if isinstance(method, str) else ""
        raise InputError(f"there is no merge method {named(method)}{close}; choose {', '.join(METHODS)}")


def check_line(method: str) -> None:
    """Refuse a rule that changes an adapter even where it is alone."""
    check_method(method)
    if method not in LINES:
        raise InputError(f"{method} changes an adapter even at weights 1 and 0, so its line would not end in the "
                         f"adapters; choose {', '.join(m for m in METHODS if m in LINES)}")  # fmt: skip


def merge(
    adapters: Sequence[AdapterWeights],
    method: str,
    weights: Sequence[float] | None = None,
    *,
    figures: Figures | None = None,
    progress: Callable = iter,
    **options: Any,
) -> AdapterWeights:
    """Merge adapters of one base model.

    Args:
        adapters: one or more; the first one gives dtype, scaling (fusion) and config. One alone is itself, times
            its weight and `scale`, cut to `rank`, whatever the method.
        method: key of `METHODS`.
        weights: one for each adapter; None: equal ones, see `AVERAGES`.
        figures: filled with what the rule has to say: what cutting lost, what aligning gained.
        progress: wraps the iterable of module names, e.g. `tqdm`.
        options: those of the rule, see `options_of`; None is the rule's default.

    Raises:
        InputError: if the method or an option is unknown, the weights do not fit, or the adapters do not: other
            base, other shapes, ranks or targets (`ALIKE`), heads or extra tensors.
    """
    options = check_options(method, options)
    weights = check_weights(method, len(adapters), weights)
    scale = options.pop("scale", 1.0)
    if len(adapters) == 1:
        rank = options.get("rank")
        if weights == [1.0] and scale == 1.0 and all(rank is None or f.r <= rank for f in adapters[0].factors.values()):
            return adapters[0]
        method, options = "task-arithmetic", {"rank": rank}
    check_fit(adapters, method, options)
    factors = {}
    for name in progress(list(dict.fromkeys(name for a in adapters for name in a.factors))):
        pairs = [(a.factors[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.factors]
        own = options | _context(method, name, figures)
        try:
            merged = METHODS[method]([f for f, _ in pairs], [w for _, w in pairs], **own)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        factors[name] = merged if scale == 1.0 else dataclasses.replace(merged, scaling=scale * merged.scaling)
    merged = adapters[0].with_factors(factors, source="+".join(a.source for a in adapters))
    heads = {task: head for a in reversed(adapters) for task, head in a.heads.items()}
    return AdapterWeights(merged.factors, merged.config, merged.extras, heads, _head_labels(adapters), merged.source)


def check_fit(adapters: Sequence[AdapterWeights], method: str, options: dict[str, Any]) -> None:
    """Refuse adapters that a method cannot merge with each other, without merging them.

    Raises:
        InputError: for other bases, other shapes, ranks or targets (`ALIKE`), heads or extra tensors.
    """
    alike = method in ALIKE and options.get("pad") is None
    for adapter in adapters:
        check_alone(adapter)
    for first, other in itertools.combinations(adapters, 2):
        check_pair(first, other, method if alike else None)


def options_of(method: str) -> list[str]:
    """Names of the options that a method takes."""
    own = [name for name in _keywords(method) if name not in ("module", "note")]
    return own if method in AVERAGES else [*own, "scale"]


def check_options(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that are given, without those that are None.

    Raises:
        InputError: if the method is unknown, does not take an option, or the option cannot have that value.
    """
    check_method(method)
    given = {name: value for name, value in options.items() if value is not None}
    known = options_of(method)
    for name, value in given.items():
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise InputError(f"{method} has no option {named(name, '')}{nearest(str(name)[:100], known)}; {takes}")
        good, must = _VALUES[name]
        if not good(value):
            raise InputError(f"--{name} is {shown(value)}, but must be {must}")
    return given


def check_weights(method: str, count: int, weights: Sequence[float] | None) -> list[float]:
    """The weights, or the default ones.

    Raises:
        InputError: if their number is another, or their sum where it must be 1.
    """
    averages = method in AVERAGES
    weights = [1.0 / count if averages else 1.0] * count if weights is None else [float(w) for w in weights]
    if len(weights) != count:
        raise InputError(f"{count} adapters were given with {len(weights)} weights; give one weight each")
    if averages and not abs(sum(weights) - 1.0) <= 1e-6:
        raise InputError(f"the weights sum to {sum(weights):g}, but {method} needs them to sum to 1")
    if not all(map(math.isfinite, weights)):
        raise InputError(f"the weights are {' '.join(f'{w:g}' for w in weights)}, but must be finite numbers")
    return weights


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (lambda v: _is_int(v, 1), "a whole number from 1 on"),
    "steps": (lambda v: _is_int(v, 1), "a whole number from 1 on"),
    "seed": (lambda v: _is_int(v, 0) and v < 1 << 64, "a whole number from 0 to 2**64 - 1"),
    "density": (lambda v: isinstance(v, int | float) and 0.0 < v <= 1.0, "above 0 and at most 1"),
    "scale": (lambda v: isinstance(v, int | float) and math.isfinite(v), "a finite number"),
    "pad": (lambda v: v == "zero", "zero"),
    "on": (lambda v: v in ("factors", "delta"), "factors or delta"),
    "inner": (lambda v: v in INNER, f"one of {', '.join(INNER)}"),
}
"""Option -> (is it a possible value, what it must be)."""


def _keywords(method: str) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(METHODS[method]).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _context(method: str, name: str, figures: Figures | None) -> dict[str, Any]:
    """What a rule gets that is no option: the module's name, and where to note figures."""
    given = {"module": name, "note": figures.of(name) if figures is not None else None}
    return {key: value for key, value in given.items() if key in _keywords(method)}


def _head_labels(adapters: Sequence[AdapterWeights]) -> dict[str, str]:
    import json

    labels = {}
    for adapter in adapters:
        labels |= json.loads(adapter.head_metadata.get("labels", "{}"))
    return {"labels": json.dumps(labels)} if labels else {}
