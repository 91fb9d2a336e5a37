"""A small Hugging Face hub on this machine: as much of its HTTP interface as uploads and downloads of models need.

Repositories live in memory as lists of commits, each a dictionary of path and content. Files that end in .safetensors
go the way of large files (git LFS): announced, uploaded to a place of their own, and named by sha256 in the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_writer"
LARGE = ".safetensors"


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # id -> path -> content
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        self.messages.append(message)
        return name

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The state of a server, for tests to look at and to spoil."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.uploads = 0
        self.address = ""


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content: bytes | Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, what: str) -> None:
        self._send(404, {"error": f"no {what}"}, X_Error_Code=what)

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    # ---- reading ---------------------------------------------------------------------------------------------------
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        words = [unquote(w) for w in urlsplit(self.path).path.strip("/").split("/")]
        api = words[:2] == ["api", "models"]
        words = words[2:] if api else words
        repository = self.hub.repositories.get("/".join(words[:2]))
        if repository is None or (repository.private and not self._may_write()):
            return self._missing("RepoNotFound")
        rest = words[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repository.find(revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        files = repository.commits[commit]
        if api and rest[:1] == ["tree"]:
            return self._send(200, [self._entry(path, content) for path, content in sorted(files.items())])
        if api:
            siblings = [{"rfilename": path} for path in sorted(files)]
            return self._send(200, {"id": "/".join(words[:2]), "sha": commit, "siblings": siblings, "tags": []})
        path = "/".join(rest[2:])
        if path not in files:
            return self._missing("EntryNotFound")
        content = files[path]
        etag = sha256(content) if path.endswith(LARGE) else git_oid(content)
        return self._send(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit)

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        return entry

    # ---- writing ---------------------------------------------------------------------------------------------------
    def do_PUT(self) -> None:
        content = self._body()
        self.hub.large[self.path.rsplit("/", 1)[1]] = content
        self.hub.uploads += 1
        self._send(200, {}, ETag=f'"{sha256(content)}"')

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if not self._may_write():
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        words = [unquote(w) for w in path.removeprefix("/api/models/").strip("/").split("/")]
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._announce(json.loads(body))
        repository = self.hub.repositories["/".join(words[:2])]
        if words[2] == "branch":
            if words[3] in repository.branches:
                return self._send(409, {"error": "the branch exists"})
            repository.branches[words[3]] = repository.branches["main"]
            return self._send(200, {})
        if words[2] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                      "shouldIgnore": False} for f in files]  # fmt: skip
            return self._send(200, {"files": modes})
        return self._commit("/".join(words[:2]), words[3], [json.loads(line) for line in body.splitlines() if line])

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self._send(
                409, {"error": "You already created this model repo", "url": f"{self.hub.address}/{name}"}
            )
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repositories[name] = made = Repository(private)
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self._send(200, {"url": f"{self.hub.address}/{name}"})

    def _announce(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            known = each["oid"] in self.hub.large
            upload = {"upload": {"href": f"{self.hub.address}/large/{each['oid']}"}}
            objects.append(each if known else {**each, "actions": upload})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, owner: str, branch: str, lines: list[dict[str, Any]]) -> None:
        repository = self.hub.repositories[owner]
        files = dict(repository.commits[repository.branches[branch]])
        message = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        name = repository.commit(branch, files, message)
        self._send(200, {"commitUrl": f"{self.hub.address}/{owner}/commit/{name}", "commitOid": name})


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
