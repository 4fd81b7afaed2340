"""How does the federated protocol run on Flower, when its clients outgrow one machine?

    server   a strategy whose aggregation is our merge       (federated.py: aggregate, for_client)
    client   our training loop on the client's share         (federated.py: train_client)
    between  A, B and the heads as NumPy arrays under their names; scalings and settings as JSON

The server sends every node the settings of all clients, and a node takes those of its `partition-id`. What is local
stays with the node: where its data are ($COPRA_DATA), where it writes, which code it runs (none that a model or a
metric brings along). A round waits for all its clients. With equal plans the merged adapter is that of the plain
protocol, byte for byte on equal machines.

Needs `pip install copra_llm[federated]`. Source: Flower (Beutel et al., arXiv 2007.14390), its message API.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from copra_llm.adapters import AdapterWeights, LoraFactors, save_adapter_weights
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.paths import HUB, SAMPLE
from copra_llm.protocols.federated import (
    Federation,
    Trained,
    aggregate,
    federated_record,
    for_client,
    record_path,
    train_client,
)
from copra_llm.protocols.plans import Rule, merge_rules
from copra_llm.protocols.runs import Run, portable
from copra_llm.results import Result, write_result

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
except ImportError as error:
    raise InputError(f"flwr is not installed whole ({error}): pip install copra_llm[federated]") from None

ARRAYS, ABOUT, SETTINGS = "arrays", "about", "settings"
"""Records of a message: tensors; what is said of them; the clients' settings."""


# --- adapters as messages ---------------------------------------------------------------------------------


def to_records(adapter: AdapterWeights) -> dict[str, ArrayRecord | ConfigRecord]:
    """An adapter as Flower's records; half-precision tensors travel as float32."""
    tensors = {f"extra:{key}": tensor for key, tensor in adapter.extras.items()}
    tensors |= {f"head:{key}": tensor for key, tensor in adapter.heads.items()}
    for name, f in adapter.factors.items():
        tensors |= {f"lora_A:{name}": f.lora_A, f"lora_B:{name}": f.lora_B}
    arrays = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # NumPy has no bfloat16.
        arrays[key] = Array((tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy())
    about = {
        "config": adapter.config,
        "scalings": {name: f.scaling for name, f in adapter.factors.items()},
        "head_metadata": adapter.head_metadata,
        "source": adapter.source,
    }
    return {ARRAYS: ArrayRecord(arrays), ABOUT: ConfigRecord({"adapter": json.dumps(about)})}


def from_records(content: RecordDict) -> AdapterWeights:
    """The inverse of `to_records`."""
    about = json.loads(content[ABOUT]["adapter"])
    tensors: dict[str, dict[str, torch.Tensor]] = {"lora_A": {}, "lora_B": {}, "extra": {}, "head": {}}
    for key, array in content[ARRAYS].items():
        kind, name = key.split(":", 1)
        tensors[kind][name] = torch.from_numpy(array.numpy().copy())
    factors = {
        name: LoraFactors(tensors["lora_A"][name], tensors["lora_B"][name], scaling)
        for name, scaling in about["scalings"].items()
    }
    heads = {"heads": tensors["head"], "head_metadata": about["head_metadata"]}
    return AdapterWeights(factors, about["config"], tensors["extra"], **heads, source=about["source"])


# --- client -----------------------------------------------------------------------------------------------


def client_app(work: Path) -> ClientApp:
    """The client: trains with our loop on the share that its node's `partition-id` names.

    Args:
        work: where its runs are kept; one that was stopped goes on.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            return Message(_train(message.content, int(context.node_config["partition-id"]), work), reply_to=message)
        except InputError as error:
            # The server gets the sentence, where Flower would send it the whole trace.
            return Message(Error(_RAISED, str(error)), reply_to=message)

    return app


_RAISED = 2
"""Flower's code for an error in the client's own code."""


def _train(content: RecordDict, client: int, work: Path) -> RecordDict:
    settings = json.loads(content[SETTINGS]["clients"])
    if not 0 <= client < len(settings):
        raise InputError(
            f"the node's partition-id is {client}, but the federation has clients 0 to {len(settings) - 1}"
        )
    config = _local(RunConfig().replace(**settings[client]))
    # A run is found again by what defines it: its settings, and what it starts from.
    digest = hashlib.sha256(json.dumps(config.flat()).encode())
    started = ARRAYS in content
    for array in content[ARRAYS].values() if started else ():
        digest.update(array.data)
    folder = work / digest.hexdigest()[:16]
    if started:
        save_adapter_weights(from_records(content), folder / "start")
        config = config.replace(init_adapter=str(folder / "start"))
    trained = train_client(config.replace(output_dir=str(folder)), folder)
    records = to_records(trained.adapter)
    more = {key: value for key, value in vars(trained).items() if key != "adapter"}
    records[ABOUT]["trained"] = json.dumps(more | {"client": client})
    return RecordDict(records)


def _local(config: RunConfig) -> RunConfig:
    """The server's settings without what only a node may decide."""
    root = config.data.data_root
    return config.replace(
        data_root=root if root in (SAMPLE, HUB) else None, trust_remote_code=False, metrics=[], report_to=[]
    )


# --- server -----------------------------------------------------------------------------------------------


class MergeStrategy(FedAvg):
    """FedAvg's rounds with our merge in the place of its average.

    Args:
        plan: who trains and how the clients count.
        config: one of `plan.configs`.
        rule: merges the adapters.
    """

    def __init__(self, plan: Federation, config: RunConfig, rule: Rule):
        # No federated evaluation: every client's run evaluates itself, and the server its merged adapter.
        super().__init__(fraction_evaluate=0.0, min_train_nodes=plan.clients, min_available_nodes=plan.clients)
        self.plan, self.config, self.rule = plan, config, rule
        self.history: list[list[Trained]] = []
        """What the clients sent back, by round."""
        self.merged: list[AdapterWeights] = []
        """The server's adapters, by round."""
        self.clients: dict[int, int] = {}
        """Client by node, as far as it has answered."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The settings for every node, and from the second round on the adapter that its client starts from."""
        index = server_round - 1
        settings = [self.plan.client_config(self.config, k, index).flat() for k in range(self.plan.clients)]
        told = ConfigRecord({"clients": json.dumps(settings)})
        messages = []
        for message in super().configure_train(server_round, ArrayRecord(), config, grid):
            node, records = message.metadata.dst_node_id, {SETTINGS: told}
            if index > 0:
                own = self.history[-1][self.clients[node]].adapter
                records |= to_records(for_client(self.merged[-1], own))
            messages.append(Message(RecordDict(records), dst_node_id=node, message_type=MessageType.TRAIN))
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, None]:
        """Merge what the clients sent back, in the order of the clients."""
        trained: dict[int, Trained] = {}
        for reply in replies:
            if reply.has_error():
                raise InputError(f"in round {server_round} node {reply.metadata.src_node_id} failed: "
                                 f"{reply.error.reason}")  # fmt: skip
            more = json.loads(reply.content[ABOUT]["trained"])
            client = more.pop("client")
            trained[client] = Trained(from_records(reply.content), **more)
            self.clients[reply.metadata.src_node_id] = client
        missing = sorted(set(range(self.plan.clients)) - trained.keys())
        if missing:
            raise InputError(f"in round {server_round} client {missing[0]} did not answer; give every node a "
                             f"partition-id of its own, from 0 to {self.plan.clients - 1}")  # fmt: skip
        self.history.append([trained[client] for client in sorted(trained)])
        self.merged.append(aggregate(self.plan, self.rule, self.history[-1]))
        return to_records(self.merged[-1])[ARRAYS], None


def serve(grid: Grid, name: str, plan: Federation, config: RunConfig, rule: Rule, results: Path, work: Path) -> Result:
    """The server: all rounds, then the merged adapter and the record.

    Args:
        grid: of the ServerApp's `main`.
        name: of the plan.
        plan, config, rule: what is run, see `MergeStrategy`.
        results: the record goes to `results/<model>/<task>/<method>/<name>-<rule>-<settings>-seed<s>.json`.
        work: the merged adapter goes here, under the same name.
    """
    strategy = MergeStrategy(plan, config, rule)
    strategy.start(grid, ArrayRecord(), num_rounds=plan.rounds, timeout=None)
    record = record_path(results, name, rule, config)
    save_adapter_weights(strategy.merged[-1], work / Run(config).place / record.stem)
    evaluator = AdapterEvaluator(config, list(config.data.tasks), "test")
    result = federated_record(name, plan, config, rule, strategy.history, strategy.merged, evaluator)
    result = portable(dataclasses.replace(result, config=result.config | {"engine": "flower"}))
    write_result(record, result)
    return result


def simulate_plan(
    name: str, plan: Federation, results: Path, work: Path, data_root: str | None, say: Callable[[str], None] = print
) -> None:
    """Do what is missing of a plan, like `run_federation`, each federation in Flower's simulation."""
    for config, rule in itertools.product(plan.configs(data_root), merge_rules(plan.merges)):
        record = record_path(results, name, rule, config)
        if not record.is_file():
            simulate(name, plan, config, rule, results, work)
            say(f"{record}: done")


def simulate(name: str, plan: Federation, config: RunConfig, rule: Rule, results: Path, work: Path) -> Result:
    """One federation in Flower's simulation on this machine: a node a client, each a process of Ray with one core.

    Args: as of `serve`; the clients' runs go to `work/clients`.

    Raises:
        InputError: if a client failed.
    """
    # Flower and Ray report their use over the network unless told not to.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from flwr.simulation import run_simulation

    server, done = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        # In a thread of Flower's, which would swallow the sentence.
        try:
            done.append(serve(grid, name, plan, config, rule, results, work))
        except InputError as error:
            done.append(error)

    cores = {"client_resources": {"num_cpus": 1}, "init_args": {"include_dashboard": False}}
    run_simulation(server, client_app(work / "clients"), num_supernodes=plan.clients, backend_config=cores)
    if not done:
        raise InputError("Flower's simulation ended without a result; its log says why")
    if isinstance(done[0], InputError):
        raise done[0]
    return done[0]
