"""A Hugging Face hub on 127.0.0.1 for tests: what huggingface_hub's client asks when it makes a repository and uploads a
folder, without Xet. Standard library only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["HubServer"]

TOKEN = "hf_tokenOfTheTests"


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    """Their messages."""


@dataclass
class HubServer:
    """`with HubServer() as hub:` answers at `hub.url`.

    refuse: gets a request's method and path; returns the status of an error, or None.
    """

    refuse: Callable[[str, str], int | None] = lambda method, path: None
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files that were uploaded, by their SHA-256."""
    requests: list[tuple[str, str]] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        hub = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else self._chunks()
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path))
                signed = self.headers.get("Authorization") == f"Bearer {TOKEN}" or path.startswith("/lfs/")
                status = hub.refuse(self.command, path) or (None if signed else 401)
                headers, content = {}, b""
                if status is None:
                    status, headers, content = hub.answer(self.command, path, body)
                elif status >= 400:
                    content = json.dumps({"error": f"refused with {status}"}).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def _chunks(self) -> bytes:
                parts = []
                while "chunked" in self.headers.get("Transfer-Encoding", ""):
                    size = int(self.rfile.readline(), 16)
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                    if not size:
                        break
                return b"".join(parts)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        def told(value: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
            return status, {"Content-Type": "application/json"}, json.dumps(value).encode()

        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.repositories:
                return told({"error": "You already created this model repo", "url": f"{self.url}/{name}"}, 409)
            self.repositories[name] = Repository(asked.get("visibility") == "private")
            return told({"url": f"{self.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            begins, _, rest = json.loads(body)["content"].partition("---\n")
            is_open = not begins and "\n---\n" not in rest
            return told({"errors": [{"message": "no end"}] if is_open else [], "warnings": []}, 400 if is_open else 200)
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return told({"error": "other bytes"}, 400)
            self.stored[match[1]] = body
            return 200, {}, b""
        match = re.match(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?(/.*|$)", path)
        repository = self.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        rest = match[2]
        if rest == "/preupload/main":
            files = json.loads(body)["files"]
            kinds = {f["path"]: "lfs" if f["path"].endswith((".safetensors", ".gguf")) else "regular" for f in files}
            return told(
                {"files": [{"path": p, "uploadMode": kind, "shouldIgnore": False} for p, kind in kinds.items()]}
            )
        if rest == "/info/lfs/objects/batch":
            return told(
                {"transfer": "basic", "objects": [self._to_upload(each) for each in json.loads(body)["objects"]]}
            )
        if rest == "/commit/main":
            return told(self._commit(match[1], repository, body))
        if rest.startswith("/tree/main"):
            return told([{"type": "file", "path": p, "size": len(f), "oid": "0"} for p, f in repository.files.items()])
        if found := re.fullmatch(r"/resolve/main/(.+)", rest):
            if found[1] not in repository.files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            content = repository.files[found[1]]
            return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "1" * 40}, content
        return told({"id": match[1], "private": repository.private, "sha": "1" * 40, "siblings": []})

    def _to_upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.stored:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.url}/lfs/{asked['oid']}"}}}

    def _commit(self, name: str, repository: Repository, body: bytes) -> dict[str, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    repository.commits.append(value["summary"])
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.stored[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]
        number = f"{len(repository.commits):040d}"
        return {"success": True, "commitOid": number, "commitUrl": f"{self.url}/{name}/commit/{number}"}
