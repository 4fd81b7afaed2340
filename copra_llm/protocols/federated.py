"""What becomes of clients that train apart, each on its share of the data, once their adapters are merged?

    round 1 ... R:   A_k <- T / R steps on D_k from the server's adapter, k = 1 ... K, each with a seed of its own
                     A   <- merge(A_1, ..., A_K; w),      w_k = |D_k| / |D|  or  1 / K

The paper has R = 1: everything is trained apart and merged once. With more rounds a client's run is a part of one
long run: t of p(t), the learning rate, the masks and the order of the data go on where its last round ended (only
AdamW's moments start anew), so that one client alone trains as it would without rounds. What a client starts a round
from is the server's adapter on the modules the client adapts, cut to its rank (the best approximation of that rank):
a mixture does not grow from round to round, and ranks, targets and depth may differ from client to client.

Every client's run is an ordinary, resumable run with a config.yaml that repeats it; what has a record is not done
again.

Source: CopRA (arXiv 2410.22911), section 3.1 and table 1 (R = 1, five clients, iid); FedAvg (McMahan et al.,
arXiv 1602.05629) for the rounds and w_k; FlexLoRA (Bai et al., arXiv 2402.11505) for unequal ranks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from copra_llm.adapters import AdapterWeights, load_adapter_weights, save_adapter_weights
from copra_llm.build import training_labels
from copra_llm.config import RunConfig, typed_settings
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.merge import AVERAGES, merge
from copra_llm.protocols.jobs import Job, run_jobs
from copra_llm.protocols.plans import Rule, check_runs, merge_rules, need_entries, tuned_settings
from copra_llm.protocols.runs import Run, Store, portable
from copra_llm.results import Result, pack_bits, peak_memory_bytes, write_result
from copra_llm.train import train_adapter


@dataclass(frozen=True)
class Federation:
    """Clients, how they differ, and how their adapters are merged."""

    model: str
    tasks: list[str]
    """Each is a federation of its own."""
    methods: list[str]
    seeds: list[int]
    """A federation each: how the data are divided, and K seeds of clients that no other federation has."""
    merges: dict[str, Any]
    """`{rule: {option: value}}`, see `merge_rules`."""
    settings: dict[str, Any]
    """What all clients share, by the flags' names. `max_steps` counts a client's steps over all rounds."""
    tuned: dict[str, Any] = field(default_factory=dict)
    """`{task: {method: {setting: value}}}`, over `settings`."""
    clients: int = 5
    rounds: int = 1
    split: str = "iid"
    """"iid" or "dirichlet"."""
    beta: float = 0.5
    """Concentration of the Dirichlet law."""
    weights: str = "examples"
    """A client counts by its number of "examples", or all are "equal"."""
    each: dict[str, Any] = field(default_factory=dict)
    """`{setting: [one value a client]}`: unequal ranks, targets, depth, ..."""

    def __post_init__(self):
        need_entries(self, "tasks", "methods", "seeds", "merges")
        check_runs(self.tasks, self.methods, self.settings)
        merge_rules(self.merges)
        if self.rounds < 1:
            raise InputError(f"the plan's rounds is {self.rounds}, but must be at least 1")
        if self.weights not in ("examples", "equal"):
            raise InputError(f'the plan\'s weights are "{self.weights}", but must be examples or equal')
        for name, values in self.each.items():
            if not isinstance(values, list) or len(values) != self.clients:
                raise InputError(f"the plan's {name} of each client is {values!r}, but must be a list of "
                                 f"{self.clients} values")  # fmt: skip
        bases = self.each.get("model_name_or_path", [self.model])
        other = next((k for k, base in enumerate(bases) if base != bases[0]), None)
        if other is not None:
            raise InputError(f"clients 0 and {other} have different base models, {bases[0]} and {bases[other]}: an "
                             "adapter is a change to its own base's weights, so theirs have no common sum; give all "
                             "clients one base")  # fmt: skip
        for config in self.configs(None):
            for client in range(self.clients):
                self.client_config(config, client)

    def configs(self, data_root: str | None) -> list[RunConfig]:
        """One a task, method and seed: what its clients share."""
        return [
            RunConfig().replace(
                **tuned_settings(self, task, method)
                | {"model_name_or_path": self.model, "data_root": data_root, "seed": seed}
                | {"num_clients": self.clients, "client_split": self.split, "dirichlet_beta": self.beta}
                | {"split_seed": seed, "resume_from_checkpoint": "latest"}
            )
            for task, method, seed in itertools.product(self.tasks, self.methods, self.seeds)
        ]

    def client_config(
        self, config: RunConfig, client: int, index: int = 0, start: Path | None = None, folder: Path = Path("runs")
    ) -> RunConfig:
        """The settings of a client's run in a round.

        Args:
            config: one of `configs`.
            client: counted from 0.
            index: the round, counted from 0.
            start: what the server sent; None in the first round.
            folder: where it is trained.
        """
        own = {name: values[client] for name, values in self.each.items()}
        config = config.replace(**typed_settings(Path("the plan's each"), own))
        if self.rounds > 1 and config.lora.changes_base:
            raise InputError(f"init_lora_weights is {config.lora.init_lora_weights}, which starts from a base of its "
                             f"own, but the plan has {self.rounds} rounds, and the later ones start from what was "
                             "merged; give one round, or another start")  # fmt: skip
        steps = config.train.max_steps
        if steps < 1 or steps % self.rounds:
            raise InputError(f"max_steps is {steps}, but must be a multiple of the {self.rounds} rounds it is made in")
        return config.replace(
            client=client,
            seed=config.train.seed * self.clients + client,
            max_steps=steps // self.rounds,
            schedule_span=[index / self.rounds, (index + 1) / self.rounds],
            init_adapter=None if start is None else str(start),
            output_dir=str(folder),
        )

    def shares(self, rule: Rule, examples: Sequence[int]) -> list[float]:
        """The weights of the clients: they sum to 1 where the rule averages, to K where it adds."""
        counts = examples if self.weights == "examples" else [1] * len(examples)
        total = 1.0 if rule.method in AVERAGES else float(len(counts))
        return [total * count / sum(counts) for count in counts]


def run_federation(
    name: str,
    plan: Federation,
    results: Path,
    work: Path,
    data_root: str | None,
    say: Callable[[str], None] = print,
    workers: int | None = None,
) -> None:
    """Do what is missing of a plan.

    Args:
        name: of the plan; part of every record's name.
        plan: who trains and how it is merged.
        results: records go to `results/<model>/<task>/<method>/<name>-<rule>-<settings>-seed<s>.json`.
        work: the clients' runs and the merged adapters, under the same names.
        data_root: of MTL15.
        say: reports progress and the time left; picklable, as workers report too.
        workers: processes side by side; None: one a GPU, or one a core.
    """
    store = Store(results, work, say)
    jobs = [
        Job(f"{Run(config).place}, {name}, seed {config.train.seed}", federate, (store, name, plan, config))
        for config in plan.configs(data_root)
    ]
    run_jobs(jobs, workers, say)


def federate(store: Store, name: str, plan: Federation, config: RunConfig) -> None:
    """One task, method and seed: train the clients and merge them by every rule that has no record."""
    run = Run(config)
    (task,) = config.data.tasks
    evaluator = AdapterEvaluator(config, [task], "test")
    for rule in merge_rules(plan.merges):
        record = record_path(store.results, name, rule, config)
        if not record.is_file():
            result = run_rounds(name, plan, config, rule, evaluator, store.work / run.place / f"{name}-{run.name}")
            write_result(record, portable(result))
            accuracy = [result.metrics[f"test/{task}/accuracy/{who}"] for who in ("origin", "merged")]
            store.say(f"{record}: clients {accuracy[0]:.1f}, merged {accuracy[1]:.1f}")


def record_path(results: Path, name: str, rule: Rule, config: RunConfig) -> Path:
    """Where the record of a federation and a merge rule lies."""
    run = Run(config)
    return results / run.place / f"{name}-{rule.name}-{run.name}.json"


def run_rounds(
    name: str, plan: Federation, config: RunConfig, rule: Rule, evaluator: AdapterEvaluator, folder: Path
) -> Result:
    """All rounds of one federation with one merge rule; `folder/<rule>/round<R>/merged` is what comes out."""
    history: list[list[Trained]] = []
    merged: list[AdapterWeights] = []
    for index in range(plan.rounds):
        place = folder / rule.name / f"round{index + 1}"
        trained = []
        for client in range(plan.clients):
            # Before anything is merged the rules have nothing of their own, and share the clients.
            home = (folder / "round1" if index == 0 else place) / f"client{client}"
            start = None
            if index > 0:
                start = home.with_name(f"start{client}")
                _keep(for_client(merged[-1], history[-1][client].adapter), start)
            trained.append(train_client(plan.client_config(config, client, index, start, home), home))
        history.append(trained)
        merged.append(aggregate(plan, rule, trained))
        _keep(merged[-1], place / "merged")
    return federated_record(name, plan, config, rule, history, merged, evaluator)


@dataclass(frozen=True)
class Trained:
    """What a client sends back after a round."""

    adapter: AdapterWeights
    entry: dict[str, Any]
    """Its line in the record: seed, examples, labels (examples of each), r, accuracy and loss on test."""
    steps: int
    seen: int
    """Training examples seen, with repetitions."""
    seconds: float


def train_client(config: RunConfig, folder: Path) -> Trained:
    """One client's round: an ordinary training run, from disk if it is finished."""
    (task,) = config.data.tasks
    result = train_adapter(config, [task], folder)
    adapter = load_adapter_weights(folder)
    own, num_labels = training_labels(config, task)
    labels = Counter(own)
    entry = {
        "seed": config.train.seed,
        "examples": len(own),
        "labels": [labels[i] for i in range(num_labels)],
        "r": _rank(adapter),
        "accuracy": result.metrics[f"test/{task}/accuracy"],
        "loss": result.metrics[f"test/{task}/loss"],
    }
    return Trained(adapter, entry, result.steps, result.examples, result.seconds)


def aggregate(plan: Federation, rule: Rule, trained: Sequence[Trained]) -> AdapterWeights:
    """The server's adapter: the clients' merged by the rule, each with its weight."""
    return rule([t.adapter for t in trained], plan.shares(rule, [t.entry["examples"] for t in trained]))


def for_client(server: AdapterWeights, own: AdapterWeights) -> AdapterWeights:
    """What a client starts its next round from: the server's adapter on its modules, cut to its rank.

    Args:
        server: the merged adapter, whatever its ranks.
        own: the client's adapter of the round before.
    """
    part = server.with_factors({name: server.factors[name] for name in own.factors}, server.source)
    return merge([part], "truncated", rank=_rank(own))


def federated_record(
    name: str,
    plan: Federation,
    config: RunConfig,
    rule: Rule,
    history: Sequence[Sequence[Trained]],
    merged: Sequence[AdapterWeights],
    evaluator: AdapterEvaluator,
) -> Result:
    """Evaluate the merged adapter of every round, and put it beside its clients.

    Args:
        name: of the plan.
        plan, config, rule: what was run.
        history: what the clients sent back, by round.
        merged: the server's adapters, by round.
        evaluator: the model and the test split.
    """
    (task,) = config.data.tasks
    rounds = []
    for index, (trained, server) in enumerate(zip(history, merged, strict=True), 1):
        outcome = evaluator(server, task)
        figures = {"accuracy": outcome.accuracy, "loss": outcome.loss, "correct": pack_bits(outcome.correct)}
        rounds.append({"round": index, "clients": [t.entry for t in trained], "merged": figures})
    metrics = {}
    for quantity in ("accuracy", "loss"):
        metrics[f"test/{task}/{quantity}/origin"] = float(np.mean([c[quantity] for c in rounds[-1]["clients"]]))
        metrics[f"test/{task}/{quantity}/merged"] = rounds[-1]["merged"][quantity]
    about = {
        "task": task, "clients": plan.clients, "split_kind": plan.split, "rounds": plan.rounds, "case": name,
        "beta": plan.beta if plan.split == "dirichlet" else None, "weighting": plan.weights, "each": plan.each,
        "merge_method": rule.method, "merge_options": rule.options, "merge_name": rule.name,
    }  # fmt: skip
    everything = [t for trained in history for t in trained]
    return Result(
        protocol="federated",
        config=config.flat() | about,
        metrics=metrics,
        seconds=sum(t.seconds for t in everything),
        peak_memory_bytes=peak_memory_bytes(),
        steps=sum(t.steps for t in everything),
        examples=sum(t.seen for t in everything),
        data={"rounds": rounds},
        environment=evaluator.environment(),
    )


def _rank(adapter: AdapterWeights) -> int:
    return max(f.r for f in adapter.factors.values())


def _keep(adapter: AdapterWeights, folder: Path) -> None:
    if not folder.is_dir():
        save_adapter_weights(adapter, folder)
