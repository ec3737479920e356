"""A server on this machine that speaks the hub's API as far as its client uses it for a model's files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_ours"


class HubServer:
    """repos: name -> branch -> file -> content. requests: every one, as "METHOD PATH"."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.url = ""

    def fetched(self) -> set[str]:
        """Files that were downloaded since the last call."""
        found = {match[1] for line in self.requests if (match := re.search(r"^GET .*/resolve/[^/]+/(.+)$", line))}
        self.requests.clear()
        return found


@contextmanager
def hub_server() -> Iterator[HubServer]:
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: Any = None, **headers: str) -> None:
            data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def handle_any(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else b""
            path = self.path.partition("?")[0]
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if path.startswith("/objects/"):
                hub.objects[path.rpartition("/")[2]] = body
                return self.answer(200, {})
            if path == "/api/whoami-v2":
                return self.answer(200, {"name": "user"}) if known else self.answer(401, {"error": "no token"})
            if path.startswith(("/api/repos", "/api/models")) and self.command == "POST" and not known:
                return self.answer(403, {"error": "this token may not write"})
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                return self.create(json.loads(body))
            for pattern, method in ROUTES:
                if match := re.fullmatch(pattern, path):
                    return getattr(self, method)(body, *match.groups())
            return self.answer(404, {"error": f"nothing at {path}"})

        do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815

        def create(self, wanted: dict[str, Any]) -> None:
            name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
            if name in hub.repos:
                return self.answer(409, {"error": "it is there", "url": f"{hub.url}/{name}"})
            hub.repos[name] = {"main": {}}
            if wanted.get("private") or wanted.get("visibility") == "private":
                hub.private.add(name)
            return self.answer(200, {"url": f"{hub.url}/{name}", "id": name})

        def branch(self, _: bytes, repo: str, branch: str) -> None:
            hub.repos[repo][branch] = dict(hub.repos[repo]["main"])
            self.answer(200, {})

        def preupload(self, body: bytes, repo: str, branch: str) -> None:
            files = json.loads(body)["files"]
            large = ("safetensors", "png")
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(large) else "regular", "oid": None}
                for one in files
            ]
            self.answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})

        def batch(self, body: bytes, repo: str) -> None:
            wanted = json.loads(body)["objects"]
            upload = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/objects/{one['oid']}", "header": {}}}}
                for one in wanted
            ]
            self.answer(200, {"transfer": "basic", "objects": upload}, Content_Type="application/vnd.git-lfs+json")

        def commit(self, body: bytes, repo: str, branch: str) -> None:
            held = hub.repos[repo][branch]
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    held[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    content = hub.objects[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"]
                    held[value["path"]] = content
            self.answer(
                200, {"success": True, "commitOid": "a" * 40, "commitUrl": f"{hub.url}/{repo}/commit/{'a' * 40}"}
            )

        def info(self, _: bytes, repo: str, revision: str | None = None) -> None:
            files = self.files(repo, revision)
            if files is not None:
                siblings = [{"rfilename": name} for name in files]
                self.answer(200, {"id": repo, "modelId": repo, "sha": sha_of(repo, revision), "siblings": siblings})

        def tree(self, _: bytes, repo: str, revision: str) -> None:
            files = self.files(repo, revision)
            if files is not None:
                known = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                self.answer(200, known)

        def resolve(self, _: bytes, repo: str, revision: str, name: str) -> None:
            files = self.files(repo, revision)
            if files is None:
                return None
            if name not in files:
                return self.answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound")
            tag = hashlib.sha256(files[name]).hexdigest()
            return self.answer(200, files[name], ETag=f'"{tag}"', X_Repo_Commit=sha_of(repo, revision))

        def files(self, repo: str, revision: str | None) -> dict[str, bytes] | None:
            branches = hub.repos.get(repo, {})
            by_sha = {sha_of(repo, branch): files for branch, files in branches.items()}
            found = branches.get(revision or "main") or by_sha.get(revision or "")
            if found is None or (repo in hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
                self.answer(404, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
                return None
            return found

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


ROUTES = (
    (r"/api/models/(.+)/branch/([^/]+)", "branch"),
    (r"/api/models/(.+)/preupload/([^/]+)", "preupload"),
    (r"/(.+)\.git/info/lfs/objects/batch", "batch"),
    (r"/api/models/(.+)/commit/([^/]+)", "commit"),
    (r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", "info"),
    (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
    (r"/api/models/([^/]+/[^/]+)", "info"),
    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
)


def sha_of(repo: str, revision: str | None) -> str:
    """Of a branch; what is one already stays."""
    revision = revision or "main"
    return (
        revision if re.fullmatch("[0-9a-f]{40}", revision) else hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
    )
