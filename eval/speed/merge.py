"""How fast are eight adapters of a 7B model merged and cut back to their rank, against PEFT's `svd`?

    python eval/speed/merge.py [--layers 32] [--adapters 8] [--rank 16] [--hidden 4096] [--mlp 11008]

32 layers of q, k, v, o (hidden x hidden), gate and up (mlp x hidden) and down (hidden x mlp), random factors.

1. This package merges all of them (`truncated`), and every rule one layer. Peak memory is read here.
2. PEFT's `add_weighted_adapter` merges the q and the gate of the first layer, and this package the same ones just
   before and after. PEFT's whole is that sample, times how often a shape occurs (down is gate transposed: the same
   cost); ours is measured whole. "svd" is PEFT's default, "svd thin" its `svd_full_matrices=False`, which matters
   where a matrix is not square.

One thread, one process. Ratios are of CPU seconds, which are what the wall clock shows on an idle core; wall seconds
stand beside them.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from copra_llm.adapters import AdapterWeights, LoraFactors
from copra_llm.errors import exit_on_input_error
from copra_llm.merge import METHODS, merge
from copra_llm.results import Result, environment, peak_memory_bytes, write_result

HERE = Path(__file__).parent
PROJECTIONS = {"q_proj": "square", "k_proj": "square", "v_proj": "square", "o_proj": "square",
               "gate_proj": "tall", "up_proj": "tall", "down_proj": "wide"}  # fmt: skip
SAMPLE = {"square": "q_proj", "tall": "gate_proj"}
"""One module a shape, of the first layer."""

Seconds = dict[str, float]
"""`cpu` and `wall`."""


@contextmanager
def clock() -> Iterator[Seconds]:
    spent: Seconds = {}
    cpu, wall = time.process_time(), time.perf_counter()
    yield spent
    spent.update(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)


def random_adapters(args: argparse.Namespace, shapes: dict[str, tuple[int, int]]) -> list[AdapterWeights]:
    """Adapters of the whole model in float32, no two numbers of one seed shared."""
    generator = torch.Generator().manual_seed(0)
    adapters = []
    for i in range(args.adapters):
        factors = {}
        for layer in range(args.layers):
            for name, kind in PROJECTIONS.items():
                out, inputs = shapes[kind]
                lora_A = torch.randn(args.rank, inputs, generator=generator) / inputs**0.5
                lora_B = torch.randn(out, args.rank, generator=generator) / args.rank**0.5
                factors[f"model.layers.{layer}.{name}"] = LoraFactors(lora_A, lora_B, 2.0)
        config = {"peft_type": "LORA", "r": args.rank, "lora_alpha": 2 * args.rank, "target_modules": []}
        adapters.append(AdapterWeights(factors, config, source=f"adapter-{i}"))
    return adapters


def part(adapters: list[AdapterWeights], wanted: Callable[[str], bool]) -> list[AdapterWeights]:
    """The adapters of some modules only."""
    return [a.with_factors({n: f for n, f in a.factors.items() if wanted(n)}, a.source) for a in adapters]


def peft_model(adapters: list[AdapterWeights], module: str, rank: int) -> nn.Module:
    """A PEFT model with the one module and all adapters, `0`, `1`, ..."""
    last = module.rsplit(".", 1)[1]
    first = adapters[0].factors[module]
    base = nn.Module()
    base.add_module(last, nn.Linear(first.lora_A.shape[1], len(first.lora_B), bias=False))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[last])
    model = get_peft_model(base, config, adapter_name="0")
    for i in range(1, len(adapters)):
        model.add_adapter(str(i), config)
    layer = model.get_submodule(f"base_model.model.{last}")
    for i, adapter in enumerate(adapters):
        layer.lora_A[str(i)].weight.data.copy_(adapter.factors[module].lora_A)
        layer.lora_B[str(i)].weight.data.copy_(adapter.factors[module].lora_B)
    return model


def by_peft(model: nn.Module, count: int, rank: int, kind: str, **options) -> tuple[Seconds, LoraFactors]:
    """Time of PEFT's merge of the one module, and what came of it."""
    names = [str(i) for i in range(count)]
    with torch.no_grad(), clock() as spent:
        model.add_weighted_adapter(
            names, [1 / count] * count, "merged", combination_type=kind, svd_rank=rank, **options
        )
    layer = next(m for m in model.modules() if hasattr(m, "lora_A") and "merged" in m.lora_A)
    made = (layer.lora_A["merged"].weight.data.clone(), layer.lora_B["merged"].weight.data.clone())
    merged = LoraFactors(*made, layer.scaling["merged"])
    model.delete_adapter("merged")
    return spent, merged


def by_us(adapters: list[AdapterWeights], method: str, **options) -> tuple[Seconds, AdapterWeights]:
    with clock() as spent:
        merged = merge(adapters, method, **options)
    return spent, merged


def distance(one: LoraFactors, other: LoraFactors) -> float:
    """Relative Frobenius distance of two products, from their factors."""
    from copra_llm.merge.lowrank import norm_of_product, stacked

    return norm_of_product(*stacked([one, other], [1.0, -1.0])) / norm_of_product(*stacked([other], [1.0]))


def our_times(adapters: list[AdapterWeights], args: argparse.Namespace) -> tuple[dict[str, Seconds], int]:
    """The whole merge, its peak memory, then one layer by every rule."""
    times = {}
    times["whole/truncated"], _ = by_us(adapters, "truncated", rank=args.rank)
    memory = peak_memory_bytes()
    tell(times, "whole/truncated")
    print(f"peak {memory / 2**30:.2f} GiB", flush=True)
    layer = part(adapters, lambda name: name.startswith("model.layers.0."))
    for method in METHODS:
        times[f"layer/{method}"], _ = by_us(layer, method)
        tell(times, f"layer/{method}")
    return times, memory


def sampled_times(
    adapters: list[AdapterWeights], args: argparse.Namespace
) -> tuple[dict[str, Seconds], dict[str, float]]:
    """One module of each shape by PEFT and by this package, and how far apart the results are."""
    times, apart = {}, {}
    for kind, last in SAMPLE.items():
        module = f"model.layers.0.{last}"
        own, model = part(adapters, lambda name, m=module: name == m), peft_model(adapters, module, args.rank)
        before, merged = by_us(own, "truncated", rank=args.rank)
        for label, options in (("svd thin", {"svd_full_matrices": False}), ("svd", {})):
            if kind == "tall" or label == "svd":
                times[f"{kind}/PEFT {label}"], theirs = by_peft(model, len(own), args.rank, "svd", **options)
                apart[f"{kind}/{label}"] = distance(theirs, merged.factors[module])
                tell(times, f"{kind}/PEFT {label}")
        after, _ = by_us(own, "truncated", rank=args.rank)
        times[f"{kind}/truncated"] = {name: (before[name] + after[name]) / 2 for name in before}
        tell(times, f"{kind}/truncated")
        if kind == "square":
            times["square/ties on delta"], _ = by_us(own, "ties", rank=args.rank, density=0.2, on="delta")
            times["square/PEFT ties_svd"], _ = by_peft(model, len(own), args.rank, "ties_svd", density=0.2)
            tell(times, "square/ties on delta", "square/PEFT ties_svd")
    return times, apart


def tell(times: dict[str, Seconds], *names: str) -> None:
    for name in names:
        print(f"{name}: {times[name]['cpu']:.2f} s CPU, {times[name]['wall']:.2f} s wall", flush=True)


def ratios(times: dict[str, Seconds], layers: int) -> dict[str, float]:
    """PEFT's seconds divided by ours, module by module and for the whole."""
    found = {}
    kinds = ["square" if kind == "square" else "tall" for kind in PROJECTIONS.values()]
    for label in ("svd", "svd thin"):
        for unit in ("cpu", "wall"):
            theirs = {"square": times["square/PEFT svd"][unit], "tall": times[f"tall/PEFT {label}"][unit]}
            whole = layers * sum(theirs[kind] for kind in kinds)
            found[f"{unit}_seconds/whole, PEFT {label}, extrapolated"] = whole
            found[f"{unit}_ratio/whole, {label}"] = whole / times["whole/truncated"][unit]
            for kind in SAMPLE:
                found[f"{unit}_ratio/{kind}, {label}"] = theirs[kind] / times[f"{kind}/truncated"][unit]
    delta = times["square/PEFT ties_svd"]["cpu"] / times["square/ties on delta"]["cpu"]
    return found | {"cpu_ratio/square, ties on delta": delta}


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 32), ("adapters", 8), ("rank", 16), ("hidden", 4096), ("mlp", 11008)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes = {"square": (args.hidden, args.hidden), "tall": (args.mlp, args.hidden), "wide": (args.hidden, args.mlp)}
    started, machine = time.perf_counter(), environment(device="cpu", threads=1)
    adapters = random_adapters(args, shapes)
    ours, memory = our_times(adapters, args)
    sampled, apart = sampled_times(part(adapters, lambda name: name.startswith("model.layers.0.")), args)
    times = ours | sampled
    metrics = ratios(times, args.layers)
    metrics |= {f"cpu_seconds/{name}": spent["cpu"] for name, spent in times.items()}
    metrics |= {f"distance_to_PEFT/{name}": value for name, value in apart.items()}
    # Resident memory's peak only grows: after the sample it is PEFT's, on top of the adapters held.
    metrics |= {
        "peak_gib/whole, this package": memory / 2**30,
        "peak_gib/one module, PEFT": peak_memory_bytes() / 2**30,
    }
    for name, value in metrics.items():
        print(f"{name}: {value:.4g}")
    config = {name: value for name, value in vars(args).items() if name != "results"}
    record = Result("speed_merge", config, metrics, time.perf_counter() - started, memory, data={"seconds": times},
                    environment=machine)  # fmt: skip
    write_result(args.results / "merge.json", record)


if __name__ == "__main__":
    sys.exit(main())
