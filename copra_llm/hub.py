"""How do adapters get to the Hugging Face Hub, and back?

    upload     the files of a folder become one commit of a model repository
    download   "owner/name" or "owner/name@revision" becomes a folder in the Hub's own cache

huggingface_hub does both, and repeats what it asks for files and their pieces by itself. What it asks once alone
(making a repository, looking a revision up, checking a card, the commit) is repeated here: none of it leaves anything
half-done, and a commit that has gone through unseen is found to change nothing.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from copra_llm import __version__
from copra_llm.adapter_files import CONFIG, CONFIG_FILE, HEAD_FILE, PUBLIC, RESULT, WEIGHTS_FILE
from copra_llm.errors import InputError
from copra_llm.results import atomic_folder

TRIES = 3
LONGEST_WAIT = 60.0
"""Seconds that are waited for a Hub that says how long to wait; if it asks for more, that is said instead."""
_PASSING = (408, 429, 500, 502, 503, 504)
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"

T = TypeVar("T")


@dataclass(frozen=True)
class HubId:
    """A repository, and which of its states."""

    repo: str
    """`owner/name`."""
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse_id(text: str) -> HubId | None:
    """`owner/name` or `owner/name@revision`; None for what is neither."""
    match = re.fullmatch(r"(\w[\w.-]{0,95}/\w[\w.-]{0,95})(?:@(\w[\w./+-]{0,255}))?", text)
    # The Hub's cache keeps a file under the revision's name: one that goes upwards is none of git's either.
    return HubId(match[1], match[2]) if match and ".." not in text else None


# --- fetching ---------------------------------------------------------------------------------------------


@functools.cache
def download(hub_id: HubId) -> Path:
    """The folder of an adapter on the Hub, in the Hub's cache; if the Hub is out of reach, as it was fetched before.

    Raises:
        InputError: if it is not there, is no adapter in safetensors, or cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    with _asking(str(hub_id)):
        files = _listed(hub_id)
        if files is not None:
            _refuse_unfit(hub_id, files)
        # The second pattern: nothing below the root, under whatever names.
        options = {"allow_patterns": list(PUBLIC), "ignore_patterns": ["*/*", "*\\*"]}
        folder = Path(persistently(lambda: snapshot_download(hub_id.repo, revision=hub_id.revision, **options)))
        if files is None:
            _refuse_unfit(hub_id, [file.name for file in folder.iterdir()])
            print(f"note: the Hub is out of reach; {hub_id} is taken as it was fetched before", file=sys.stderr)
        return folder


def pull(hub_id: HubId, output: Path | None = None) -> Path:
    """`download`, and, where a folder is named, a copy there that is whole or absent."""
    folder = download(hub_id)
    if output is None:
        return folder
    with atomic_folder(output) as fresh:
        for file in sorted(folder.iterdir()):
            if file.name in PUBLIC:
                shutil.copyfile(file, fresh / file.name)
    return output


def _listed(hub_id: HubId) -> list[str] | None:
    """The names of a repository's files; None if nobody answers."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        info = persistently(lambda: _api().model_info(hub_id.repo, revision=hub_id.revision))
    except HfHubHTTPError:
        raise
    except (HTTPError, OfflineModeIsEnabled):
        return None
    return [file.rfilename for file in info.siblings or ()]


def _refuse_unfit(hub_id: HubId, files: list[str]) -> None:
    if CONFIG_FILE not in files:
        raise InputError(f"{hub_id} holds no {CONFIG_FILE}, so it is no adapter of PEFT; name a repository of one")
    if WEIGHTS_FILE not in files:
        pickled = " (pickled ones can run code, and are not fetched)" if "adapter_model.bin" in files else ""
        raise InputError(f"{hub_id} has no weights in {WEIGHTS_FILE}{pickled}; ask its owner to save them anew")


# --- pushing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pushed:
    """Where a push has arrived."""

    repo: str
    commit: str
    url: str


def upload(
    folder: Path, repo: str, *, private: bool = False, revision: str | None = None, message: str = "Upload an adapter"
) -> Pushed:
    """Make the files of a folder one commit; the repository and the branch are made where they are not there.

    What an earlier push has left of this package's own files, and is in the folder no more, goes in the same commit.

    Args:
        folder: without folders in it.
        repo: `owner/name`.
        private: make the repository so.
        revision: the branch; None: main.
        message: of the commit.

    Raises:
        InputError: if the Hub refuses, cannot be reached, or has a public repository where a private one is wanted.
    """
    api = _api()
    with _asking(repo):
        persistently(lambda: api.create_repo(repo, private=private or None, exist_ok=True))
        if private and not persistently(lambda: api.model_info(repo)).private:
            raise InputError(f"{repo} is there already, and public; make it private on its page, or name another")
        if revision is not None:
            persistently(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
        done = persistently(lambda: _commit(api, folder, repo, revision, message))
    return Pushed(repo, done.oid, done.commit_url)


def _commit(api, folder: Path, repo: str, revision: str | None, message: str):
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = {file.name: file for file in sorted(folder.iterdir())}
    there = api.list_repo_files(repo, revision=revision)
    gone = [name for name in (HEAD_FILE, CONFIG, RESULT) if name in there and name not in files]
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    operations += [CommitOperationDelete(path_in_repo=name) for name in gone]
    return api.create_commit(repo, operations, commit_message=message, revision=revision)


def full_name(repo: str) -> str:
    """`owner/name`, the owner being whoever the token belongs to where none is named.

    Raises:
        InputError: if there is no token, it is not taken, or the name is none.
    """
    check_name(repo)
    need_token(repo)
    if "/" in repo:
        return repo
    with _asking(repo):
        return f"{persistently(_api().whoami)['name']}/{repo}"


def check_name(repo: str) -> None:
    """Raise InputError for what can be no name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise InputError(f'"{repo}" can be no repository\'s name; give owner/name, of letters, digits, "-", "_" and '
                         '".", the name 96 characters at most') from None  # fmt: skip


def need_token(repo: str) -> None:
    """Raise InputError where nothing can be pushed: the Hub is switched off, or nobody is logged in."""
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise InputError(f"{repo} cannot be pushed while HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise InputError(f"{repo} cannot be pushed without a token; {_LOGIN}")


@contextmanager
def switched_off() -> Iterator[None]:
    """No request goes to the Hub inside; its cache is read."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def licence_of(repo: str) -> str | None:
    """The licence that a model's card on the Hub names; None if it names none, or several, or cannot be asked."""
    try:
        with _asking(repo):
            data = _api().model_info(repo).card_data
    except InputError:
        return None
    licence = data.license if data is not None else None
    # "other" has its name beside it, and means nothing without.
    return licence if isinstance(licence, str) and licence != "other" else None


def _api():
    from huggingface_hub import HfApi

    return HfApi(library_name="copra_llm", library_version=__version__)


# --- what can go wrong ------------------------------------------------------------------------------------


def persistently(ask: Callable[[], T]) -> T:
    """What a question to the Hub gives, asked again, `TRIES` times in all, where the reason may pass."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    tried = 0
    while True:
        try:
            return ask()
        except OfflineModeIsEnabled:
            raise
        except (HTTPError, json.JSONDecodeError) as error:
            tried += 1
            wait = _wait(error, tried)
            if wait is None:
                raise
            time.sleep(wait)


def _wait(error: Exception, tried: int) -> float | None:
    """Seconds until the next try; None: there is no sense in one."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if tried >= TRIES or (status is not None and status not in _PASSING):
        return None
    asked = _asked_wait(error)
    wait = 2.0 ** (tried - 1) if asked is None else asked
    return wait if wait <= LONGEST_WAIT else None


def _asked_wait(error: Exception) -> float | None:
    """Seconds that the Hub asks to wait, by either of its headers."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(error, "response", None), "headers", {})
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    said = headers.get("Retry-After", "")
    return float(said) if said.isdigit() else None


@contextmanager
def _asking(repo: str) -> Iterator[None]:
    """Whatever huggingface_hub raises becomes an InputError; what the disk refuses stays what it is.

    Its progress bars are for terminals alone.
    """
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    except InputError:
        raise
    except LocalEntryNotFoundError as error:
        raise InputError(_sentence(repo, error.__cause__ or error)) from None
    # RuntimeError: Xet's transfers; ValueError: names, cards and answers that are not as they should be.
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise InputError(_sentence(repo, error)) from None
    finally:
        if quiet:
            enable_progress_bars()


def _sentence(repo: str, error: BaseException) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    # Xet's transfers name it in words alone.
    if status is None and (named := re.search(r"HTTP status .*?\((\d{3}) ", str(error))):
        status = int(named[1])
    said = " ".join((getattr(error, "server_message", None) or "").split())[:200]
    reason = f"{status}: {said}" if said else f"{status}"
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return f"{repo} has not been fetched before, and the Hub is switched off; unset HF_HUB_OFFLINE"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: ask for access on its page, then {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision ({reason}); name one of its branches, tags or commits"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return f"the Hub has no {repo}, or not for you ({reason}); check the name, and {_LOGIN}"
    if status == 403:
        return f"the Hub does not let you do this with {repo} ({reason}); {_LOGIN}, with a token that has the right"
    if status in (409, 412):
        return f"{repo} was changed by somebody else at the same time ({reason}); try again"
    if status == 429:
        wait = _asked_wait(error)
        return f"the Hub takes no more requests for now (429); try again in {f'{wait:.0f} s' if wait else 'a while'}"
    if status is not None:
        remedy = "try again later" if status >= 500 else "mend what it names"
        return f"the Hub could not do it for {repo} ({reason}); {remedy}"
    if isinstance(error, json.JSONDecodeError):
        return f"the Hub has answered something that is no JSON for {repo}; try again later"
    first = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, errors.HTTPError):
        return f"the connection to the Hub failed for {repo} ({first}); look at the network, and try again"
    return f"{repo}: {first}"
