"""
A small Hugging Face Hub on this machine, in memory, that answers what `huggingface_hub` asks for model repositories.

Files of weights and the like go to LFS storage, in one part, as on the Hub for clients without Xet; all others are sent in
the commit itself ("regular").
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_local"
USER = "user"
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
# of what the Hub puts into a new repository's .gitattributes
_LFS = (".arrow", ".bin", ".ckpt", ".gz", ".npz", ".parquet", ".pkl", ".pt", ".pth", ".safetensors", ".zip")
_REPO_ID = re.compile(r"([\w.-]+/)?[\w.-]+")


@dataclass
class Commit:
    """One commit: its id, its message, and all files of the repository after it."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository: its commits in order, of which each branch names the last of its own."""

    private: bool
    commits: list[Commit] = field(default_factory=lambda: [Commit(_oid("empty"), "initial commit", {})])
    branches: dict[str, str] = field(default_factory=lambda: {"main": _oid("empty")})

    def at(self, revision: str) -> Commit:
        oid = self.branches.get(revision, revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")


class RefusedError(Exception):
    """An answer of the Hub that is an error."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class LocalHub:
    """
    The Hub, as a context manager that serves at `endpoint`.

    Attributes:
        repos: The repositories by id.
        lfs: What was sent to LFS storage, by SHA-256.
        environment: What a process needs to take this for the Hub, whatever this process was told.
        unknown: Requests that were not understood.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.unknown: list[str] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # another host, as that of the Hub's storage is: what a redirect within the Hub says of a file would be lost
        self._storage = f"http://localhost:{self._server.server_port}/lfs"
        self.environment = {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def repo(self, repo_id: str) -> Repo:
        if repo_id not in self.repos:
            raise RefusedError(404, "RepoNotFound", "Repository not found")
        return self.repos[repo_id]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository by path."""
        return self.repo(repo_id).at(revision).files

    # What follows are the answers: JSON, from the parts of the path, the query and the body.

    def whoami(self) -> Any:
        return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}

    def create(self, body: bytes) -> Any:
        wanted = json.loads(body)
        if wanted.get("type", "model") != "model":
            raise RefusedError(400, "", "This Hub has models only")
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}
        with self._lock:
            if repo_id in self.repos:
                raise RefusedError(409, "", json.dumps(answer))
            self.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        return answer

    def validate_yaml(self, body: bytes) -> Any:
        text = json.loads(body)["content"]
        block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        if block is None:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            data = yaml.safe_load(block.group(1))
        except yaml.YAMLError as error:
            raise RefusedError(400, "", json.dumps({"errors": [{"message": str(error)}], "warnings": []})) from error
        wrong = [
            f'"{key}" with value "{name}" is not valid.'
            for key in ("base_model", "datasets")
            for name in ([data[key]] if isinstance(data.get(key), str) else data.get(key) or [])
            if not _REPO_ID.fullmatch(name)
        ]
        if wrong:
            raise RefusedError(400, "", json.dumps({"errors": [{"message": text} for text in wrong], "warnings": []}))
        return {"errors": [], "warnings": []}

    def preupload(self, repo: str, revision: str, body: bytes) -> Any:
        there = self.repo(repo).at(revision).files
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(_LFS) else "regular",
                    "shouldIgnore": False,
                    "oid": _etag(file["path"], there[file["path"]]) if file["path"] in there else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def lfs_batch(self, repo: str, body: bytes) -> Any:
        self.repo(repo)
        objects = json.loads(body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.lfs:
                wanted["actions"] = {
                    "upload": {"href": f"{self._storage}/{wanted['oid']}"},
                    "verify": {"href": f"{self.endpoint}/api/lfs-verify"},
                }
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "", "The content is not what was announced")
        self.lfs[oid] = body
        return {}

    def lfs_verify(self, body: bytes) -> Any:
        wanted = json.loads(body)
        if len(self._lfs_object(wanted["oid"])) != wanted["size"]:
            raise RefusedError(422, "", "The size is not what was announced")
        return {}

    def _lfs_object(self, oid: str) -> bytes:
        if oid not in self.lfs:
            raise RefusedError(404, "", "There is no such LFS object")
        return self.lfs[oid]

    def commit(self, repo: str, revision: str, body: bytes, create_pr: bool) -> Any:
        lines = [json.loads(line) for line in body.splitlines()]
        with self._lock:
            found = self.repo(repo)
            files, message = dict(found.at(revision).files), ""
            for line in lines:
                key, value = line["key"], line["value"]
                if key == "header":
                    message = value["summary"]
                elif key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = self._lfs_object(value["oid"])
                elif key == "deletedFile":
                    del files[value["path"]]
                else:
                    raise RefusedError(400, "", f"This Hub knows no {key}")
            oid = _oid(f"{repo} {len(found.commits)}")
            found.commits.append(Commit(oid, message, files))
            number = len(found.branches)
            found.branches[f"refs/pr/{number}" if create_pr else revision] = oid
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo}/commit/{oid}"}
        return {**answer, "pullRequestUrl": f"{self.endpoint}/{repo}/discussions/{number}"} if create_pr else answer

    def info(self, repo: str, revision: str = "main") -> Any:
        found = self.repo(repo)
        commit = found.at(revision)
        return {
            "_id": _oid(repo)[:24],
            "id": repo,
            "modelId": repo,
            "sha": commit.oid,
            "private": found.private,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def tree(self, repo: str, revision: str, folder: str, recursive: bool) -> Any:
        files = self.repo(repo).at(revision).files
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in sorted(files) if path.startswith(prefix)]
        if folder and not inside:
            raise RefusedError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        folders = dict.fromkeys(path[: path.index("/", len(prefix))] for path in inside if "/" in path[len(prefix) :])
        return [
            *({"type": "directory", "path": path, "oid": _oid(path), "size": 0} for path in folders),
            *(
                {"type": "file", "path": path, "size": len(files[path]), **_oids(path, files[path])}
                for path in inside
                if recursive or "/" not in path[len(prefix) :]
            ),
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        try:
            stored = re.fullmatch(r"/lfs/(?P<oid>[0-9a-f]{64})", url.path)
            if stored is not None and self.command in ("GET", "HEAD"):
                self._send(200, self.hub._lfs_object(stored["oid"]), {"Accept-Ranges": "bytes"})
                return
            file = re.fullmatch(rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", url.path)
            if file is not None and self.command in ("GET", "HEAD"):
                self._send_file(**{name: unquote(part) for name, part in file.groupdict().items()})
            else:
                self._send(200, json.dumps(self._route(url.path, parse_qs(url.query), body)).encode())
        except RefusedError as error:
            text = str(error)
            self._send(
                error.status,
                (text if text.startswith("{") else json.dumps({"error": text})).encode(),
                {"X-Error-Code": error.code, "X-Error-Message": "" if text.startswith("{") else text},
            )

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> Any:
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusedError(401, "", "Invalid username or password.")
        hub = self.hub
        plain = {
            ("GET", "/api/whoami-v2"): hub.whoami,
            ("POST", "/api/repos/create"): lambda: hub.create(body),
            ("POST", "/api/validate-yaml"): lambda: hub.validate_yaml(body),
            ("POST", "/api/lfs-verify"): lambda: hub.lfs_verify(body),
        }
        if (self.command, path) in plain:
            return plain[self.command, path]()
        revision = r"(?P<revision>[^/]+)"
        storage = re.fullmatch(rf"/{_REPO}\.git/info/lfs/objects/batch|/lfs/(?P<oid>[0-9a-f]{{64}})", path)
        if storage is not None and (self.command, storage["repo"] is None) in (("POST", False), ("PUT", True)):
            if storage["oid"] is not None:
                return hub.lfs_put(storage["oid"], body)
            return hub.lfs_batch(storage["repo"], body)
        for command, pattern, answer in (
            ("GET", "", hub.info),
            ("GET", f"/revision/{revision}", hub.info),
            ("POST", f"/preupload/{revision}", lambda **parts: hub.preupload(**parts, body=body)),
            (
                "POST",
                f"/commit/{revision}",
                lambda **parts: hub.commit(**parts, body=body, create_pr="create_pr" in query),
            ),
            (
                "GET",
                f"/tree/{revision}/?(?P<folder>.*)",
                lambda **parts: hub.tree(**parts, recursive=query.get("recursive", ["false"])[0].lower() == "true"),
            ),
        ):
            found = re.fullmatch(f"/api/models/{_REPO}{pattern}", path)
            if found is not None and command == self.command:
                return answer(**{name: unquote(part) for name, part in found.groupdict().items()})
        hub.unknown.append(f"{self.command} {path}")
        raise RefusedError(404, "", "This Hub does not know what you ask for")

    def _send_file(self, repo: str, revision: str, path: str) -> None:
        commit = self.hub.repo(repo).at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path in commit.files and path.endswith(_LFS):  # the storage is elsewhere, and so said
            content = commit.files[path]
            oid = _etag(path, content)
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            self._send(302, b"", {**headers, **linked, "Location": f"{self.hub._storage}/{oid}"})
        elif path in commit.files:
            content = commit.files[path]
            self._send(200, content, {**headers, "ETag": f'"{_etag(path, content)}"', "Accept-Ranges": "bytes"})
        else:
            self._send(404, b"Entry not found", {**headers, "X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Print nothing."""


def _oid(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def _etag(path: str, content: bytes) -> str:
    """The id of a file's content, as git or LFS gives it; clients compare it to see whether it changed."""
    if path.endswith(_LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oids(path: str, content: bytes) -> dict[str, Any]:
    """How a file is listed: of one in LFS storage, git has a pointer."""
    oid = _etag(path, content)
    if not path.endswith(_LFS):
        return {"oid": oid}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n"
    return {
        "oid": _etag("pointer", pointer.encode()),
        "lfs": {"oid": oid, "size": len(content), "pointerSize": len(pointer)},
    }
