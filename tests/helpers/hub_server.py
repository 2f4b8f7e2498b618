"""A small Hub on loopback: the part of its protocol by which `huggingface_hub` creates, fills, lists and reads
repositories of models and data sets.

It has one user and one branch, `main`, and keeps all in memory. Files named as in `LFS` are uploaded apart, by the
protocol of Git LFS; the others are part of their commit. There is no Xet storage: clients set `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

HOST = "127.0.0.1"
USER, TOKEN = "user", "hf_loopback"
LFS = ("*.safetensors", "*.bin", "*.parquet")


@dataclass(frozen=True)
class File:
    """What a commit holds under a path."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """The name by which a client knows a file's content: Git's, or that of LFS."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def described(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        lfs = {"oid": self.oid, "size": len(self.content), "pointerSize": 130}
        return entry | {"lfs": lfs} if self.is_lfs else entry


Files = dict[str, File]  # by path


@dataclass
class Repository:
    """The files of every commit by its id, oldest first."""

    commits: dict[str, Files] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit({})

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> Files:
        return self.commits[self.head]

    def commit(self, files: Files) -> str:
        oid = secrets.token_hex(20)
        self.commits[oid] = files
        return oid


class Reply(NamedTuple):
    body: bytes
    headers: dict[str, str]
    status: int = 200


class Refusal(Exception):
    """An answer that is an error; clients tell some errors by their code."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


class Hub:
    """
    A Hub that answers while it is started.

    Attributes:
        repositories: By kind, `"models"` or `"datasets"`, and name, `"user/name"`.
        objects: What was uploaded by LFS, by its SHA-256.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.drops_uploads = False
        self.lock = threading.Lock()
        self.port = 0  # the system chooses, once

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def start(self) -> None:
        self.server = ThreadingHTTPServer((HOST, self.port), partial(_Handler, self))
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """Nobody listens."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextmanager
    def dropping_uploads(self) -> Iterator[None]:
        """The connection breaks in the middle of each upload by LFS."""
        self.drops_uploads = True
        try:
            yield
        finally:
            self.drops_uploads = False

    def model(self, name: str) -> Repository:
        return self.repositories["models", name]

    def commits(self) -> dict[tuple[str, str], list[str]]:
        """Ids of the commits of every repository."""
        return {name: list(repository.commits) for name, repository in self.repositories.items()}


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.size = int(self.headers.get("Content-Length", 0))
        if self.command == "PUT" and self.hub.drops_uploads:
            self.rfile.read(self.size // 2)
            return
        self.body = self.rfile.read(self.size)
        try:
            with self.hub.lock:
                reply = self.act(url.path)
        except Refusal as refusal:
            reply = Reply(_json({"error": str(refusal)}), refusal.headers, refusal.status)
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_HEAD = do_GET = do_POST = do_PUT = answer

    def act(self, path: str) -> Reply:
        method = "GET" if self.command == "HEAD" else self.command
        for route in ROUTES:
            if route.method == method and (match := re.fullmatch(route.path, path)):
                self.check_token(route.is_public)
                answer = route.action(self, **{name: unquote(part or "") for name, part in match.groupdict().items()})
                return answer if isinstance(answer, Reply) else Reply(_json(answer), {})
        raise Refusal(404, f"this Hub does not know {self.command} {path}")

    def check_token(self, is_public: bool) -> None:
        given = self.headers.get("Authorization")
        if given != f"Bearer {TOKEN}" and not (given is None and is_public):
            raise Refusal(401, "Invalid credentials in Authorization header" if given else "Log in first")

    def repository(self, kind: str, name: str) -> Repository:
        repository = self.hub.repositories.get((kind or "models", name))
        if repository is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repository

    def files_at(self, kind: str, name: str, revision: str) -> tuple[str, Files]:
        """Id and files of a commit."""
        repository = self.repository(kind, name)
        commit = repository.head if revision in ("", "main") else revision
        if commit not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repository.commits[commit]

    def log_message(self, *args: Any) -> None:
        """Nothing on the screen."""

    # --- Repositories ---

    def create(self) -> Any:
        wanted = json.loads(self.body)
        kind, name = f"{wanted.get('type') or 'model'}s", f"{wanted['organization'] or USER}/{wanted['name']}"
        url = f"{self.hub.url}/{name}" if kind == "models" else f"{self.hub.url}/{kind}/{name}"
        if (kind, name) in self.hub.repositories:
            return Reply(_json({"error": "You already created this repo", "url": url}), {}, 409)
        self.hub.repositories[kind, name] = Repository()
        return {"url": url, "name": name}

    def validate_card(self) -> Any:
        return {"errors": [], "warnings": []}  # cards are taken as they are

    def info(self, kind: str, name: str, revision: str) -> Any:
        commit, files = self.files_at(kind, name, revision)
        return {"id": name, "sha": commit, "private": False, "siblings": [{"rfilename": path} for path in files]}

    def tree(self, kind: str, name: str, revision: str, folder: str) -> Any:
        files = self.files_at(kind, name, revision)[1]
        root = PurePosixPath(folder)
        is_deep = self.query.get("recursive") == ["true"]
        found = [
            entry
            for path, entry in _entries(files).items()
            if (root in path.parents if is_deep else root == path.parent)
        ]
        if folder and not found:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return found

    def paths_info(self, kind: str, name: str, revision: str) -> Any:
        """As huggingface_hub before 2 asks for some of the files."""
        entries = _entries(self.files_at(kind, name, revision)[1])
        wanted = parse_qs(self.body.decode()).get("paths", [])
        return [entries[PurePosixPath(path)] for path in wanted if PurePosixPath(path) in entries]

    # --- Uploads ---

    def preupload(self, kind: str, name: str, revision: str) -> Any:
        files = self.files_at(kind, name, revision)[1]
        wanted = json.loads(self.body)["files"]
        for entry in wanted:
            path = entry["path"]
            is_lfs = any(fnmatch(path, pattern) for pattern in LFS)
            entry |= {"uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            entry["oid"] = files[path].oid if path in files else None
        return {"files": wanted}

    def lfs_batch(self, kind: str, name: str) -> Any:
        self.repository(kind, name)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content is not what the object's name says")
        self.hub.objects[oid] = self.body
        return {}

    def commit(self, kind: str, name: str, revision: str) -> Any:
        files = dict(self.files_at(kind, name, revision)[1])
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = File(self.hub.objects[value["oid"]], is_lfs=True)
            elif key != "header":
                raise Refusal(400, f"this Hub does not know the operation {key}")
        oid = self.repository(kind, name).commit(files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}

    # --- Downloads ---

    def resolve(self, kind: str, name: str, revision: str, path: str) -> Reply:
        commit, files = self.files_at(kind, name, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        return Reply(files[path].content, {"X-Repo-Commit": commit, "ETag": f'"{files[path].oid}"'})


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _entries(files: Files) -> dict[PurePosixPath, dict[str, Any]]:
    """Files and folders, as the Hub lists them."""
    folders = {folder for path in files for folder in PurePosixPath(path).parents if folder.name}
    entries = {folder: {"type": "directory", "path": str(folder), "size": 0, "oid": "0" * 40} for folder in folders}
    return entries | {PurePosixPath(path): file.described(path) for path, file in files.items()}


class Route(NamedTuple):
    method: str
    path: str
    action: Callable[..., Any]
    is_public: bool


API = "/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
WEB = "/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)"
REVISION = "/(?P<revision>[^/]+)"
ROUTES = [
    Route("POST", "/api/repos/create", _Handler.create, False),
    Route("POST", "/api/validate-yaml", _Handler.validate_card, True),
    Route("GET", f"{API}(?:/revision{REVISION})?", _Handler.info, True),
    Route("GET", f"{API}/tree{REVISION}(?:/(?P<folder>.+))?", _Handler.tree, True),
    Route("POST", f"{API}/paths-info{REVISION}", _Handler.paths_info, True),
    Route("POST", f"{API}/preupload{REVISION}", _Handler.preupload, False),
    Route("POST", rf"{WEB}\.git/info/lfs/objects/batch", _Handler.lfs_batch, False),
    Route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put, True),  # its address is the permission
    Route("POST", f"{API}/commit{REVISION}", _Handler.commit, False),
    Route("GET", f"{WEB}/resolve{REVISION}/(?P<path>.+)", _Handler.resolve, True),
]
