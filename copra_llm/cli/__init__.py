"""`copra`: merge adapters, look along the line between them and into their layers, prune, evaluate, fold, report;
share them; check data; plan runs.

    copra merge A B --method fusion --weights 0.5 0.5 --output DIR
    copra interpolate A B --task sst2 --points 21 --output DIR
    copra prune A --keep every-other --output DIR
    copra shapley A --task sst2 --output FILE
    copra landscape A B C --task sst2 --grid 11 --output DIR
    copra similarity A B C D --output DIR
    copra evaluate A --task sst2
    copra generate A --prompt TEXT
    copra data check FILES... --model_name_or_path M
    copra data check oxford_pets --data_root DIR
    copra data lm-eval arc_easy --output DIR
    copra plan --model_name_or_path M --max_steps N
    copra fold A --output DIR
    copra report RESULTS... --output report.html
    copra push A owner/name
    copra pull owner/name --output DIR

An adapter is a folder that PEFT's `save_pretrained` has written, a run's folder, or a hub id: owner/name, with
@revision for another than its main one.
"""

from __future__ import annotations

import argparse
import sys

from copra_llm import __version__
from copra_llm.cli import (
    data,
    evaluate,
    fold,
    generate,
    interpolate,
    landscape,
    merge,
    plan,
    prune,
    pull,
    push,
    report,
    shapley,
    similarity,
)
from copra_llm.errors import InputError, exit_on_input_error, nearest

COMMANDS = {
    "merge": merge,
    "interpolate": interpolate,
    "prune": prune,
    "shapley": shapley,
    "landscape": landscape,
    "similarity": similarity,
    "evaluate": evaluate,
    "generate": generate,
    "data": data,
    "plan": plan,
    "fold": fold,
    "report": report,
    "push": push,
    "pull": pull,
}
"""Command-line names -> modules with `HELP`, `add_arguments(parser)` and `run(args)`."""


@exit_on_input_error
def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        raise InputError(f'there is no command "{words[0]}"{nearest(words[0], COMMANDS)}; see copra --help')
    args = parser.parse_args(words)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="copra", description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"copra_llm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        flags = [o for action in self._actions for o in action.option_strings]
        unknown = next((w for w in message.split() if w.startswith("--")), "")
        hint = nearest(unknown, flags) if "unrecognized" in message else ""
        raise InputError(f"{message}{hint}; see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):
        # Refused by the command's own parser, which knows the flags that come near.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown
