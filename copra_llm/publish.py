"""What of an adapter becomes public, and is it fit to?

    prepare    the files of a repository, in a folder: nothing in them is of this machine alone
    push       that folder, as one commit
    Publisher  the same for every adapter of a training run

A folder is looked through for paths and secrets before anything leaves the machine.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from huggingface_hub import get_token
from safetensors import safe_open

from copra_llm import hub
from copra_llm.adapter_files import (
    CARD,
    CONFIG,
    CONFIG_FILE,
    HEAD_FILE,
    PUBLIC,
    RESULT,
    RUN_FOLDER,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
)
from copra_llm.adapters import adapter_folder, load_adapter_weights
from copra_llm.config import RunConfig, dump_yaml
from copra_llm.errors import InputError
from copra_llm.model_card import Adapter, card
from copra_llm.models import PACKAGED, load_tokenizer, packaged_path
from copra_llm.portable import has_secret, is_local, place_in, portable_values, texts
from copra_llm.report import connectivity_table
from copra_llm.report.records import find_records
from copra_llm.report.sections.pruning import pruning_section
from copra_llm.report.sections.together import federated_section, multitask_section
from copra_llm.report.tables import markdown
from copra_llm.results import Result, read_result, write_atomic, write_result
from copra_llm.saved_runs import SavedRun, read_run
from copra_llm.settings import HubSettings
from copra_llm.tasks.instruct.named import template_text
from copra_llm.train import run_folder

UNSAID = ("output_dir", "resume_from_checkpoint", *(f.name for f in dataclasses.fields(HubSettings)))
"""Settings that say where a run was, and nothing of what it did."""
VOCABULARY = tuple(name for name in TOKENIZER_FILES if name not in ("tokenizer_config.json", "chat_template.jinja"))
"""Files of any texts whatever, which are the base's own and public already."""


def prepare(
    path: str | Path,
    folder: Path,
    repo: str,
    *,
    base_model: str | None = None,
    results: Sequence[Path] = (),
    licence: str | None = None,
) -> list[str]:
    """Write what a repository is to hold into an empty folder.

    Args:
        path: a run's folder, an adapter's (a merged one's too), or a hub id.
        folder: to write to.
        repo: the repository's name, for the card.
        base_model: the base's hub id; None: the one that the adapter names.
        results: records of merging and pruning it, for the card.
        licence: of the base; None: unknown.

    Returns:
        Sentences about what was left out.

    Raises:
        InputError: if it is no LoRA adapter in safetensors, its base has no hub id, or something in the files is of
            this machine alone, or a secret.
    """
    own, weights = adapter_folder(path), load_adapter_weights(path)
    base = hub_base(base_model or weights.named_base(), str(path))
    run = read_run(path)
    settings = _public_settings(run.settings, base) if run.settings else None
    record = _public_record(_record_of(run, own), base)
    config = portable_values(weights.config) | {"base_model_name_or_path": base}
    shutil.copyfile(own / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    if weights.heads:
        shutil.copyfile(own / HEAD_FILE, folder / HEAD_FILE)
    write_atomic(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if settings is not None:
        write_atomic(folder / CONFIG, dump_yaml(settings))
    if record is not None:
        write_result(folder / RESULT, record)
    notes = _write_tokenizer(weights.named_base(), run, folder)
    about = Adapter(repo, base, config, settings, record, [name.removesuffix(".weight") for name in weights.heads],
                    licence, findings(results) if results else "")  # fmt: skip
    write_atomic(folder / CARD, card(about))
    check_public(folder, [own, run.folder])
    return notes


def push(
    path: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
    results: Sequence[Path] = (),
) -> tuple[hub.Pushed, list[str]]:
    """`prepare` in a folder of its own, and upload it.

    Args:
        path, base_model, results: as for `prepare`.
        repo, private, revision: as for `hub.upload`; a name without an owner is the token's owner's.

    Returns:
        Where it is, and what `prepare` has to say.

    Raises:
        InputError: as both do.
    """
    repo = hub.full_name(repo)
    base = hub_base(base_model or load_adapter_weights(path).named_base(), str(path))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        licence = known_licence(base) or hub.licence_of(base)
        notes = prepare(path, folder, repo, base_model=base, results=results, licence=licence)
        return hub.upload(folder, repo, private=private, revision=revision, message="Upload a LoRA adapter"), notes


def push_each(config: RunConfig, results: Iterable[Result]) -> Iterator[Result]:
    """The results of `train_each`, each pushed when it is there, if the settings ask for it.

    Raises:
        InputError: before the first, for what cannot be pushed; after the last, if a push has failed.
    """
    publisher = Publisher(config, several=len(config.data.tasks) > 1 and not config.data.joint)
    try:
        for result in results:
            yield result
            publisher.push(run_folder(config, result.config["tasks"]), result)
    except InputError as error:
        publisher.failures.insert(0, str(error))
    publisher.finish()


class Publisher:
    """What `--push_to_hub` asks for, adapter by adapter; a push that fails leaves the run as it is."""

    def __init__(self, config: RunConfig, several: bool = False):
        """Refuse now what would be refused when hours have passed.

        Args:
            config: of the run.
            several: whether it trains more than one adapter, each of which then adds its tasks to the name.

        Raises:
            InputError: if the base has no hub id, the name is none, or nobody is logged in.
        """
        self.settings, self.several = config.hub, several
        self.name = config.hub.hub_model_id or Path(config.train.output_dir).resolve().name
        self.failures: list[str] = []
        if self.settings.push_to_hub:
            model = config.model.model_name_or_path
            hub_base(PACKAGED[model].hub_id if model in PACKAGED else model, "--push_to_hub",
                     "train without it, and push with copra push RUN OWNER/NAME --base_model ID")  # fmt: skip
            hub.check_name(self.name)
            hub.need_token(self.name)

    def push(self, folder: Path, result: Result) -> None:
        """Push a run that has ended, from the main process; what goes wrong is kept for `finish`."""
        if not self.settings.push_to_hub or not PartialState().is_main_process:
            return
        # "+" joins tasks in a folder's name; a repository's may not have it.
        repo = "-".join([self.name, *(result.config["tasks"] if self.several else ())])
        private = self.settings.hub_private_repo
        try:
            pushed, notes = push(folder, repo, private=private)
        except InputError as error:
            again = f"copra push {folder} {repo}{' --private' if private else ''}"
            self.failures.append(f"{folder} is whole, but was not pushed ({error}): {again}")
            return
        for sentence in [*notes, f"{folder}: pushed to {pushed.url}"]:
            print(sentence)

    def finish(self) -> None:
        """Raise InputError if a push has failed, with the command that pushes later."""
        if self.failures:
            raise InputError("; ".join(self.failures))


def hub_base(name: str, place: str, remedy: str = "name its hub id with --base_model OWNER/NAME") -> str:
    """A base model's hub id.

    Raises:
        InputError: for a folder or file of this machine; `place` says where it is named, `remedy` what helps.
    """
    if is_local(name) or name.endswith(".gguf") or Path(name).exists():
        raise InputError(f"{place}: the base model {name} is a path of this machine, where nobody else finds it; "
                         f"{remedy}")  # fmt: skip
    hub.check_name(name)
    return name


def known_licence(base: str) -> str | None:
    """The licence that the card of a packaged base names; None for others, and where it names none."""
    from huggingface_hub import ModelCard

    short = next((short for short, model in PACKAGED.items() if model.hub_id == base), None)
    try:
        path = packaged_path(short) / CARD if short is not None else None
    except InputError:  # not installed: its card is not here
        return None
    licence = ModelCard.load(path).data.license if path is not None and path.is_file() else None
    return licence if isinstance(licence, str) else None


def findings(results: Sequence[Path]) -> str:
    """Markdown tables of records: merged pairs, tasks and clients in one adapter, pruned variants.

    Raises:
        InputError: for what is no record, or if none of them is of these kinds.
    """
    records = [dataclasses.replace(r, config=portable_values(r.config)) for r in find_records(results).results]
    parts = [merged] if (merged := connectivity_table(records)) else []
    for build in (multitask_section, federated_section, pruning_section):
        section = build(records)
        parts += [f"{t.caption}. {t.note}\n\n{markdown(t)}" for t in section.tables] if section is not None else []
    if not parts:
        raise InputError(f"{', '.join(map(str, results))}: no record of merged or pruned adapters; give those of "
                         "copra interpolate or copra prune")  # fmt: skip
    return "\n".join(parts)


# --- the files --------------------------------------------------------------------------------------------


def _record_of(run: SavedRun, own: Path) -> Result | None:
    """The record, if it is this adapter's: a checkpoint's folder lies in a run, but the record is of its end."""
    if own in (run.folder, run.folder / RUN_FOLDER) and (run.folder / RESULT).is_file():
        return read_result(run.folder / RESULT)
    return None


def _public_settings(settings: dict[str, Any], base: str) -> RunConfig:
    return RunConfig.from_flat(_public_values(settings, base))


def _public_values(settings: dict[str, Any], base: str) -> dict[str, Any]:
    """Settings without places, those of the Hub included."""
    said = {name: value for name, value in settings.items() if name not in UNSAID}
    if isinstance(root := said.get("data_root"), str) and root not in ("sample", "hub"):
        said["data_root"] = None
    if "model_name_or_path" in said:
        said["model_name_or_path"] = base
    return portable_values(said)


def _public_record(record: Result | None, base: str) -> Result | None:
    if record is None:
        return None
    environment = portable_values(record.environment) | {"base_model": base}
    return dataclasses.replace(record, config=_public_values(record.config, base), environment=environment)


def _write_tokenizer(base: str, run: SavedRun, folder: Path) -> list[str]:
    """The base's tokenizer, with the chat template of the run; a sentence if it cannot be had."""
    try:
        tokenizer = load_tokenizer(base, run.config.model.trust_remote_code)
        if run.config.instruct is not None and run.config.instruct.chat_template is not None:
            tokenizer.chat_template = template_text(tokenizer, run.config.instruct.chat_template)
    except InputError as error:
        return [f"note: the tokenizer is left out ({error})"]
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        for file in Path(name).iterdir():
            if file.name in TOKENIZER_FILES:
                shutil.copyfile(file, folder / file.name)
    path = folder / "tokenizer_config.json"
    write_atomic(path, json.dumps(portable_values(json.loads(path.read_text(encoding="utf-8"))), indent=2) + "\n")
    return []


# --- the last look ----------------------------------------------------------------------------------------


def check_public(folder: Path, places: Iterable[Path] = ()) -> None:
    """Refuse a folder that holds a path of this machine, something like a secret, or a file of another kind.

    Args:
        folder: what is to be pushed.
        places: folders whose names must not be in it, beside the home and the working directory.

    Raises:
        InputError: with the file and, of a text, the line.
    """
    token = get_token()
    for file in sorted(folder.iterdir()):
        if file.name not in PUBLIC or not file.is_file():
            raise InputError(f"{file.name} is no file of an adapter; take it out of {folder}")
        if file.name in VOCABULARY:
            continue
        for number, line in enumerate(_lines(file), 1):
            if has_secret(line, [token] if token else []):
                raise InputError(f"{file.name}, line {number} holds what looks like a token or a password; nothing "
                                 "was pushed: take it out of the run's settings or record")  # fmt: skip
            if (place := place_in(line, places)) is not None:
                raise InputError(f"{file.name}, line {number} names {place}, a folder of this machine; nothing was "
                                 "pushed: take it out of the run's settings or record")  # fmt: skip
        path = next(filter(is_local, _settings_in(file)), None)
        if path is not None:
            raise InputError(f"{file.name} names {path}, a path of this machine; nothing was pushed: take it out")


def _lines(file: Path) -> list[str]:
    """A text's lines; of a weights file what stands in its header beside the tensors."""
    if file.suffix != ".safetensors":
        return file.read_text(encoding="utf-8").splitlines()
    with safe_open(file, framework="pt") as opened:
        return [json.dumps(opened.metadata() or {})]


def _settings_in(file: Path) -> Iterable[str]:
    """The texts in files of settings; a record's data may be any texts (answers), its settings may not."""
    if file.name not in (CONFIG_FILE, CONFIG, RESULT):
        return []
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    return texts(values if file.name != RESULT else [values["config"], values["environment"]])
