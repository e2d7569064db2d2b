"""A small Hugging Face Hub on 127.0.0.1: the few endpoints that publishing calls, in memory, with faults on demand."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ4sT6vW8yZ2cF0uXr5"


@dataclass
class Repository:
    """A repository: branch -> path -> bytes."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)

    def tree(self, revision: str) -> dict[str, bytes] | None:
        """The files of a branch, or of the newest commit."""
        return self.branches.get(self.commits[-1].split()[0] if revision in self._oids() else revision)

    def _oids(self) -> list[str]:
        return [commit.split()[1] for commit in self.commits]


@dataclass
class HubServer:
    """Runs in a thread; a context manager.

    Attributes:
        repositories: `datasets/owner/name` or `models/owner/name` -> what is there.
        lost_commits: so many commits are answered with 503.
        ignored: files that the repository's `.gitignore` names.
        uploads: oids of large files that were sent, in order.
        requests: method and path of each request.
        tokens: the tokens that were seen.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    lost_commits: int = 0
    ignored: tuple[str, ...] = ()
    large: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    def __enter__(self) -> "HubServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def env(self) -> dict[str, str]:
        """The environment that leads the client here, with a token, and without Xet, which talks to servers of its
        own."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, str | None]:
        """Status, JSON and the Hub's error code."""
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, None
        if path.startswith("/large/"):
            oid = path.rpartition("/")[2]
            self.uploads.append(oid)
            self.large[oid] = body
            return (200 if hashlib.sha256(body).hexdigest() == oid else 400), {}, None
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"objects": [self._batch(each) for each in json.loads(body)["objects"]]}, None
        if not path.startswith(("/api/datasets/", "/api/models/")):
            return 404, {"error": "no such route"}, None
        _, _, kind, owner, name, *rest = path.split("/")
        repository = self.repositories.get(f"{kind}/{owner}/{name}")
        if repository is None:
            return 404, {"error": "Repository not found"}, "RepoNotFound"
        return self._of_repository(f"{owner}/{name}", repository, rest, body)

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any, str | None]:
        name = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
        url = f"{self.url}/{name}".replace("/models/", "/")
        if name in self.repositories:
            return 409, {"error": "You already created this repo", "url": url}, None
        self.repositories[name] = Repository(private=asked.get("visibility") == "private")
        return 200, {"url": url}, None

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        known = asked["oid"] in self.large
        actions = {} if known else {"actions": {"upload": {"href": f"{self.url}/large/{asked['oid']}"}}}
        return {"oid": asked["oid"], "size": asked["size"], **actions}

    def _of_repository(
        self, repo_id: str, repository: Repository, rest: list[str], body: bytes
    ) -> tuple[int, Any, str | None]:
        match rest:
            case [] | ["revision", _]:
                sha = repository.commits[-1].split()[1] if repository.commits else "0" * 40
                return 200, {"id": repo_id, "sha": sha, "private": repository.private, "siblings": []}, None
            case ["branch", branch]:
                repository.branches.setdefault(unquote(branch), {**repository.branches["main"]})
                return 200, {}, None
            case ["tree", revision, *_]:
                tree = repository.tree(unquote(revision))
                if tree is None:
                    return 404, {"error": "Revision not found"}, "RevisionNotFound"
                return 200, [self._entry(path, data) for path, data in sorted(tree.items())], None
            case ["preupload", revision]:
                tree = repository.tree(unquote(revision)) or {}
                return 200, {"files": [self._mode(each, tree) for each in json.loads(body)["files"]]}, None
            case ["commit", revision]:
                if self.lost_commits > 0:
                    self.lost_commits -= 1
                    return 503, {"error": "try again"}, None
                return self._commit(repo_id, repository, unquote(revision), body)
        return 404, {"error": "no such route"}, None

    def _mode(self, asked: dict[str, Any], tree: dict[str, bytes]) -> dict[str, Any]:
        path = asked["path"]
        mode = "lfs" if path.endswith((".parquet", ".safetensors")) else "regular"
        names = {"lfs": lambda data: hashlib.sha256(data).hexdigest(), "regular": _blob}
        oid = names[mode](tree[path]) if path in tree else None
        return {"path": path, "uploadMode": mode, "shouldIgnore": path in self.ignored, "oid": oid}

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        oid = hashlib.sha256(data).hexdigest()
        lfs = {"lfs": {"oid": oid, "size": len(data), "pointerSize": 130}} if oid in self.large else {}
        return {"type": "file", "path": path, "size": len(data), "oid": _blob(data), **lfs}

    def _commit(self, repo_id: str, repository: Repository, branch: str, body: bytes) -> tuple[int, Any, str | None]:
        tree = {**repository.branches[branch]}
        oid = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    repository.commits.append(f"{branch} {oid} {value['summary']}")
                case "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    tree[value["path"]] = self.large[value["oid"]]
                case "deletedFile":
                    del tree[value["path"]]
        repository.branches[branch] = tree
        return 200, {"commitUrl": f"{self.url}/{repo_id}/commit/{oid}", "commitOid": oid}, None


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.serve()

        def do_POST(self) -> None:
            self.serve()

        def do_PUT(self) -> None:
            self.serve()

        def serve(self) -> None:
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            hub.tokens.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
            status, answer, code = hub.answer(self.command, path, self.body())
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if code is not None:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(data)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", "0")))
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
