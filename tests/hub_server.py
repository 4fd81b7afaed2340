"""A model hub on this machine's loopback: as much of the Hub's HTTP interface as huggingface_hub needs to make a
repository, commit to it and read it back, and to be refused on demand.

    with HubServer() as hub:
        hub.fail("POST", "/commit/", 503)          # the next request like that
        ...                                        # with HF_ENDPOINT = hub.url
        hub.files("me/adapter")                    # name -> bytes
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 34
"""The one token that may write; it is `USER`'s."""
USER = "tester"
LARGE = ".safetensors"
"""Files that end so go through the LFS protocol."""


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})
    """Every state of each branch, the newest last: name of a file -> bytes."""
    messages: list[str] = field(default_factory=list)
    """Of all commits."""

    def state(self, revision: str) -> dict[str, bytes] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((s for states in self.branches.values() for s in states if commit_id(s) == revision), None)


@dataclass
class Failure:
    method: str
    part: str
    """Of the path."""
    status: int | None
    """None: the connection is cut in the middle of the answer's body."""
    headers: dict[str, str]
    body: bytes
    times: int


def commit_id(state: dict[str, bytes]) -> str:
    """Forty hexadecimal digits of a state."""
    digest = hashlib.sha1()
    for name, content in sorted(state.items()):
        digest.update(name.encode() + hashlib.sha1(content).digest())
    return digest.hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_oid(content)


class HubServer:
    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        """Large files by their SHA-256."""
        self.failures: list[Failure] = []
        self.lose_answer: str | None = None
        """The next request whose path holds this is done, but its answer never comes."""
        self.waits: list[float] = []
        """Seconds that clients were to sleep, where a test counts them."""
        self.seen: list[str] = []
        """Method and path of every request."""
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, files: dict[str, bytes], **settings) -> None:
        """A repository with files, as if it had been pushed."""
        made = self.repositories[repo] = Repository(**settings)
        made.branches["main"].append(dict(files))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repo].state(revision)

    def fail(self, method: str, part: str, status: int | None, *, times: int = 1, body: bytes = b"{}", **headers):
        """Refuse the next `times` requests of this method whose path holds `part`."""
        named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
        self.failures.append(Failure(method, part, status, named, body, times))

    def requests(self, part: str) -> int:
        """How many requests held this in their method and path."""
        return sum(part in line for line in self.seen)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    lost = False

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    # --- every request ---

    def answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.seen.append(f"{self.command} {path}")
            failure = self.failure(path)
            if failure is None:
                self.lost = bool(self.hub.lose_answer) and self.hub.lose_answer in path
                self.hub.lose_answer = None if self.lost else self.hub.lose_answer
                return self.route(path)
        if failure.status is not None:
            return self.reply(failure.status, failure.body, **failure.headers)
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(b"x" * 10)
        self.close_connection = True
        self.connection.close()

    def failure(self, path: str) -> Failure | None:
        for failure in self.hub.failures:
            if failure.times and failure.method == self.command and failure.part in path:
                failure.times -= 1
                return failure
        return None

    def reply(self, status: int, body: bytes | dict | list = b"", **headers):
        if self.lost:
            self.close_connection = True
            return self.connection.close()
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str):
        self.reply(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    @property
    def writes(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    # --- the interface ---

    def route(self, path: str):
        parts = path.strip("/").split("/")
        if path == "/":  # is anybody there?
            return self.reply(200)
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return self.reply(200, {"name": USER}) if self.writes else self.refuse(401, "Unauthorized")
        if path == "/api/repos/create":
            return self.create()
        if parts[0] == "lfs":
            return self.store(parts[1])
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch()
        if len(parts) < 4:
            return self.refuse(404, "NotFound")
        owner, name = parts[2:4] if parts[0] == "api" else parts[:2]
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if repository is None or (repository.private and not self.writes):
            return self.refuse(404, "RepoNotFound")
        if parts[0] != "api":
            return self.file(repository, parts[3], "/".join(parts[4:]))
        if self.command != "GET" and not self.writes:
            return self.refuse(401, "Unauthorized")
        action, *rest = parts[4:] or ("revision", "main")
        return getattr(self, f"api_{action}")(repository, f"{owner}/{name}", *rest)

    def create(self):
        if not self.writes:
            return self.refuse(401, "Unauthorized")
        asked = json.loads(self.body)
        repo = f"{asked['organization'] or USER}/{asked['name']}"
        there = repo in self.hub.repositories
        if not there:
            self.hub.repositories[repo] = Repository(asked.get("visibility") == "private")
        return self.reply(409 if there else 200, {"url": f"{self.hub.url}/{repo}"})

    def api_branch(self, repository: Repository, repo: str, branch: str):
        if branch in repository.branches:
            return self.refuse(409, "Conflict")
        repository.branches[branch] = [repository.state("main")]
        return self.reply(200, {})

    def api_revision(self, repository: Repository, repo: str, revision: str):
        state = repository.state(revision)
        if state is None:
            return self.refuse(404, "RevisionNotFound")
        card = state.get("README.md", b"").decode()
        head = card.split("---")[1] if card.startswith("---") else "{}"
        import yaml

        siblings = [{"rfilename": name} for name in sorted(state)]
        about = {"id": repo, "private": repository.private, "sha": commit_id(state), "siblings": siblings}
        return self.reply(200, about | {"cardData": yaml.safe_load(head)})

    def api_tree(self, repository: Repository, repo: str, revision: str, *below: str):
        state = repository.state(revision)
        if state is None:
            return self.refuse(404, "RevisionNotFound")
        if below:
            return self.refuse(404, "EntryNotFound")
        entries = []
        for name, content in state.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": etag(name, content), "size": len(content), "pointerSize": 1}
            entries.append(entry)
        return self.reply(200, entries)

    def api_preupload(self, repository: Repository, repo: str, revision: str):
        state = repository.state(revision) or {}
        files = [
            {"path": (name := asked["path"]), "uploadMode": "lfs" if name.endswith(LARGE) else "regular",
             "shouldIgnore": False, "oid": etag(name, state[name]) if name in state else None}
            for asked in json.loads(self.body)["files"]
        ]  # fmt: skip
        return self.reply(200, {"files": files})

    def batch(self):
        objects = []
        for asked in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"},
                       "verify": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}  # fmt: skip
            known = asked["oid"] in self.hub.objects
            objects.append(asked | ({} if known else {"actions": actions}))
        return self.reply(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str):
        """PUT: a large file; POST: is it there, and whole?"""
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                return self.refuse(400, "BadContent")
            self.hub.objects[oid] = self.body
        size = len(self.hub.objects.get(oid, b""))
        right = self.command == "PUT" or json.loads(self.body)["size"] == size
        return self.reply(200, {}) if right else self.refuse(400, "NotThere")

    def api_commit(self, repository: Repository, repo: str, revision: str):
        if revision not in repository.branches:
            return self.refuse(404, "RevisionNotFound")
        state = dict(repository.state(revision))
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.messages.append(value["summary"])
            elif entry["key"] == "file":
                state[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                state[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del state[value["path"]]
        repository.branches[revision].append(state)
        commit = commit_id(state)
        return self.reply(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    def file(self, repository: Repository, revision: str, name: str):
        state = repository.state(revision)
        if state is None:
            return self.refuse(404, "RevisionNotFound")
        commit = commit_id(state)
        if name not in state:
            return self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = state[name]
        headers = {"X_Repo_Commit": commit, "ETag": f'"{etag(name, content)}"', "Accept_Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked and self.command == "GET":
            first = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content_Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            return self.reply(206, content[first:], **headers)
        return self.reply(200, content, **headers)
