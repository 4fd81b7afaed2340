"""Server and client for `flwr run` and for SuperNodes on machines of their own: one federation of the plan."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from copra_llm.errors import InputError
from copra_llm.protocols.federated import Federation
from copra_llm.protocols.flower import client_app, serve
from copra_llm.protocols.plans import merge_rules, read_plans

client = client_app(Path("runs/flower/clients").absolute())
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    told = context.run_config
    plan = read_plans(Path(told["plan"]), Federation)[told["name"]]
    chosen = {"task": told["task"], "method": told["method"], "seed": told["seed"]}
    configs = [c for c in plan.configs(told.get("data_root")) if _about(c) == chosen]
    rules = [rule for rule in merge_rules(plan.merges) if rule.name == told["rule"]]
    if not configs or not rules:
        raise InputError(f"the plan {told['name']} has no {chosen} with the rule {told['rule']}")
    serve(grid, told["name"], plan, configs[0], rules[0], Path(told["results"]), Path(told["work"]))


def _about(config) -> dict:
    return {"task": config.data.tasks[0], "method": config.schedule.method, "seed": config.train.seed}
