"""
A Hub on loopback: the endpoints with which `huggingface_hub` pushes a folder and loads a model by id.

Real commits over real HTTP: create, validate, preupload, LFS, commit, info, tree, resolve. It does not speak Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


class HubServer(ThreadingHTTPServer):
    """
    Args:
        bound (`socket.socket`): Its address is the endpoint.
        token (`str`): What every request that writes must bear.

    Attributes:
        repos (`dict[str, list[tuple[str, dict[str, bytes]]]]`): The commits of a repository: id, all its files then.
        messages (`list[str]`): Of the commits, in order.
        refuse (`dict[str, tuple[int, str]]`): Endpoint → status and message it answers with.
        deaf (`bool`): Hang up on every request.
        large (`tuple[str, ...]`): Files with such endings go through LFS.
    """

    daemon_threads = True

    def __init__(self, bound, token: str) -> None:
        super().__init__(bound.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.token = bound, token
        self.forget()
        self.server_activate()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def forget(self) -> None:
        """Be an empty Hub that refuses nothing."""
        self.repos, self.blobs, self.messages, self.refuse = {}, {}, [], {}
        self.deaf, self.large = False, ()

    def files(self, repo: str) -> dict[str, bytes]:
        """What the main branch holds."""
        return self.repos[repo][-1][1]

    def commit(self, repo: str, files: dict[str, bytes], message: str) -> str:
        commits = self.repos[repo]
        content = {**(commits[-1][1] if commits else {}), **files}
        oid = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits.append((oid, content))
        self.messages.append(message)
        return oid


_WRITING = ("create", "preupload", "batch", "commit")


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    ROUTES = {
        "create": r"POST /api/repos/create",
        "validate": r"POST /api/validate-yaml",
        "preupload": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)",
        "batch": r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
        "blob": r"PUT /lfs/(?P<oid>\w+)",
        "commit": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)",
        "tree": r"GET /api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)",
        "info": r"GET /api/models/(?P<repo>[^/]+/[^/]+?)(/revision/(?P<revision>[^/]+))?",
        "resolve": r"(GET|HEAD) /(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
    }

    def log_message(self, *args) -> None:
        pass

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {unquote(urlsplit(self.path).path)}"
        name, match = next(((n, m) for n, r in self.ROUTES.items() if (m := re.fullmatch(r, line))), (None, None))
        if self.server.deaf:
            self.close_connection = True
        elif match is None:
            self._fail(404, f"This Hub has no {line}.")
        elif name in _WRITING and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._fail(401, "Invalid username or password.")
        elif name in self.server.refuse:
            self._fail(*self.server.refuse[name])
        else:
            getattr(self, f"_{name}")(**{key: value for key, value in match.groupdict().items() if value})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _answer(self, status: int, content: dict | list | bytes, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, message: str, code: str = "") -> None:
        self._answer(status, {"error": message}, X_Error_Message=message, X_Error_Code=code)

    def _snapshot(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit asked for; answers, and returns nothing, if there is none."""
        commits = self.server.repos.get(repo)
        if not commits:
            self._fail(404, "Repository not found", "RepoNotFound")
            return None
        for oid, files in reversed(commits):
            if revision in ("main", oid):
                return oid, files
        self._fail(404, "Invalid rev id", "RevisionNotFound")
        return None

    # -- writing ---------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization'] or 'user'}/{asked['name']}"
        known = repo in self.server.repos
        self.server.repos.setdefault(repo, [])
        host = self.headers["Host"]
        self._answer(409 if known else 200, {"url": f"http://{host}/{repo}", "error": "exists"})

    def _validate(self) -> None:
        content = json.loads(self.body)["content"]
        data = yaml.safe_load(content.split("---")[1])
        missing = [name for name in ("tags", "library_name") if name not in data]
        self._answer(400 if missing else 200, {"errors": [{"message": f"no {name}"} for name in missing]})

    def _preupload(self, repo: str, revision: str) -> None:
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(self.server.large) and self.server.large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self._answer(200, {"files": files})

    def _batch(self, repo: str) -> None:
        host = self.headers["Host"]
        objects = [
            {**asked, "actions": {"upload": {"href": f"http://{host}/lfs/{asked['oid']}"}}}
            for asked in json.loads(self.body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def _blob(self, oid: str) -> None:
        right = hashlib.sha256(self.body).hexdigest() == oid
        self.server.blobs[oid] = self.body
        self._answer(200 if right else 400, b"")

    def _commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = {}
        for value in (line["value"] for line in lines if line["key"] == "file"):
            files[value["path"]] = base64.b64decode(value["content"])
        for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
            files[value["path"]] = self.server.blobs[value["oid"]]
        header = next(line["value"] for line in lines if line["key"] == "header")
        oid = self.server.commit(repo, files, header["summary"])
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": f"/{repo}/commit/{oid}"})

    # -- reading ---------------------------------------------------------------------------------------------------

    def _info(self, repo: str, revision: str = "main") -> None:
        if snapshot := self._snapshot(repo, revision):
            oid, files = snapshot
            self._answer(200, {"id": repo, "sha": oid, "siblings": [{"rfilename": name} for name in files]})

    def _tree(self, repo: str, revision: str) -> None:
        if snapshot := self._snapshot(repo, revision):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in snapshot[1].items()
            ]
            self._answer(200, entries)

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        if snapshot := self._snapshot(repo, revision):
            oid, files = snapshot
            if path not in files:
                self._fail(404, "Entry not found", "EntryNotFound")
            else:
                etag = hashlib.sha1(files[path]).hexdigest()
                self._answer(200, files[path], ETag=f'"{etag}"', X_Repo_Commit=oid)
