"""A Hub on loopback for tests: repositories of models in memory, behind as much of its HTTP API as clients use here.

```python
with HubStub() as hub:
    subprocess.run([...], env=hub.environ(tmp_path))  # read when huggingface_hub is imported
    hub.files("user/model")["README.md"]
```
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


USER = "user"
REPO = r"(?P<repo>[^/]+/[^/]+)"


class HubStub:
    """Serves until the `with` block ends.

    Attributes:
        url: the endpoint.
        repos: by id the commits, oldest first; a commit holds the whole tree, content by path.
        requests: what was asked, `"GET /path"`.
    """

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}  # by sha256, uploaded before the commit that names them
        self.requests: list[str] = []
        self.lock = threading.Lock()
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubStub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo: str) -> dict[str, bytes]:
        """The tree of the newest commit."""
        return self.repos[repo][-1]

    def environ(self, home: str | os.PathLike[str]) -> dict[str, str]:
        """The environment of a process that takes this for the Hub, with a cache of its own in `home`."""
        kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_of_the_stub",
            "HF_HOME": str(Path(home)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    """One request; `ROUTES` at the end of the file say which method answers it."""

    hub: HubStub
    protocol_version = "HTTP/1.1"

    def _dispatch(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self._read()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            for pattern, answer in ROUTES:
                if match := re.fullmatch(pattern, path):
                    answer(self, **match.groupdict())
                    return
            self.refuse("NotFound", f"the stub has no {path}")

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch  # noqa: N815 - http.server's names

    def log_message(self, *args: object) -> None:
        pass

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: str, message: str, status: int = 404) -> None:
        self.reply({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def tree(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit's id and files; answers the request where there is none."""
        commits = self.hub.repos.get(repo)
        if commits is None:
            self.refuse("RepoNotFound", "Repository not found")
            return None
        by_id = {_commit_id(repo, i): i for i in range(len(commits))}
        number = len(commits) - 1 if revision == "main" else by_id.get(revision)
        if number is None:
            self.refuse("RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return _commit_id(repo, number), commits[number]

    # ---- answers

    def whoami(self) -> None:
        self.reply({"type": "user", "name": USER, "fullname": USER, "orgs": []})

    def validate_yaml(self) -> None:
        self.reply({"errors": [], "warnings": []})

    def create(self) -> None:
        wanted = self.json()
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        exists = repo in self.hub.repos
        self.hub.repos.setdefault(repo, [{}])
        answer = {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo}
        if exists:  # the client reads the address of an existing repository from the error
            self.reply(answer | {"error": "You already created this model repo"}, 409)
        else:
            self.reply(answer)

    def preupload(self, repo: str, revision: str) -> None:
        if found := self.tree(repo, revision):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin")) else "regular",
                    "shouldIgnore": False,
                    "oid": _blob_id(found[1][file["path"]]) if file["path"] in found[1] else None,
                }
                for file in self.json()["files"]
            ]
            self.reply({"files": modes})

    def lfs_batch(self, repo: str) -> None:
        objects = []
        for item in self.json()["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.large:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{item['oid']}"}}
            objects.append(entry)
        self.reply({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.refuse("BadRequest", "the content is not what its hash says", 400)
            return
        self.hub.large[oid] = self.body
        self.reply({})

    def commit(self, repo: str, revision: str) -> None:
        found = self.tree(repo, revision)
        if found is None:
            return
        files = dict(found[1])
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"], None)
        self.hub.repos[repo].append(files)
        oid = _commit_id(repo, len(self.hub.repos[repo]) - 1)
        self.reply({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def info(self, repo: str, revision: str | None = None) -> None:
        if found := self.tree(repo, revision or "main"):
            oid, files = found
            siblings = [{"rfilename": path} for path in sorted(files)]
            self.reply({"id": repo, "modelId": repo, "sha": oid, "private": False, "tags": [], "siblings": siblings})

    def list_tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        if found := self.tree(repo, revision):
            inside = {path: data for path, data in found[1].items() if path.startswith(f"{folder}/" if folder else "")}
            if folder and not inside:
                self.refuse("EntryNotFound", f"{folder} does not exist")
                return
            self.reply(
                [
                    {"type": "file", "path": path, "oid": _blob_id(data), "size": len(data)}
                    for path, data in sorted(inside.items())
                ]
            )

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.tree(repo, revision)
        if found is None:
            return
        oid, files = found
        if path not in files:
            self.reply(b"", 404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=oid)
            return
        self.reply(files[path], X_Repo_Commit=oid, ETag=f'"{_blob_id(files[path])}"')


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _commit_id(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


ROUTES = [
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/validate-yaml", _Handler.validate_yaml),
    (r"/api/repos/create", _Handler.create),
    (rf"/api/models/{REPO}", _Handler.info),
    (rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    (rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.list_tree),
    (rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"/upload/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    (rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
