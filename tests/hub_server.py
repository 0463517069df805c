"""A server on loopback that speaks as much of the Hub's protocol as `huggingface_hub` needs to push and to load models.

    with Hub() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home)})

Repositories are kept in memory, a dictionary {path: bytes} a commit. `hub.fault` breaks what comes next: "upload" (the
connection ends within a file), "commit" (refused when all files are there), "download" (the connection ends in the
middle, once), "always" (each time); a client sets it by POST /fault/NAME.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "loopback" * 5


class Hub(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}  # of a commit
        self.heads: dict[str, dict[str, str]] = {}  # of a repository: branch -> commit, the newest last
        self.private: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.fault: str | None = None
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What a client's process needs; its cache is in `home`."""
        environment = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
                       "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        return {**environment, "HF_TOKEN": token or ""}

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((repo, len(self.files), sorted(files))).encode()).hexdigest()
        self.files[sha] = files
        self.heads.setdefault(repo, {})[branch] = sha
        return sha

    def head(self, repo: str) -> dict[str, bytes]:
        return self.files[self.heads[repo]["main"]]

    def __enter__(self) -> Hub:
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: object = b"", status: int = 200, **headers: object) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command == "POST" else b""
        self.server.requests.append(f"{self.command} {path}")
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                repo = match.groupdict().get("repo")
                if repo is not None and not self.may(repo):
                    return self.refuse(401, "RepoNotFound")
                return method(self, body=body, **match.groupdict())
        self.refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def may(self, repo: str) -> bool:
        """Reading what is there and public, and all with a token."""
        reads = self.command in ("GET", "HEAD") and repo not in self.server.private
        return repo in self.server.heads and (reads or self.headers.get("Authorization") == f"Bearer {TOKEN}")

    def revision(self, repo: str, revision: str) -> str | None:
        return revision if revision in self.server.files else self.server.heads[repo].get(revision)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized")
        repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if repo in self.server.heads:
            return self.answer({"url": f"{self.server.url}/{repo}"}, 409)
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(repo)
        self.server.commit(repo, "main", {})
        self.answer({"url": f"{self.server.url}/{repo}"})

    def branch(self, body: bytes, repo: str, name: str) -> None:
        if name in self.server.heads[repo]:
            return self.refuse(409, "BranchExists")
        self.server.heads[repo][name] = self.server.heads[repo]["main"]
        self.answer({})

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        sha = self.revision(repo, revision or "main")
        if sha is None:
            return self.refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": path} for path in self.server.files[sha]]
        self.answer({"id": repo, "modelId": repo, "sha": sha, "private": repo in self.server.private, "tags": [],
                     "siblings": siblings})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self.server.files[self.revision(repo, revision)]
        self.answer([{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                     for path, content in files.items()])

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        if (sha := self.revision(repo, revision)) is None:
            return self.refuse(404, "RevisionNotFound")
        if (content := self.server.files[sha].get(path)) is None:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0").split("-")[0]) or 0)
        partial = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes",
                   **partial}
        if self.command == "GET" and self.server.fault in ("download", "always") and path.endswith("safetensors"):
            self.server.fault = None if self.server.fault == "download" else "always"
            self.close_connection = True
            self.send_response(206 if partial else 200)
            for name, value in {**headers, "Content_Length": len(content) - start}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            return self.wfile.write(content[start : (start + len(content)) // 2]) and None
        self.answer(content[start:], 206 if partial else 200, **headers)

    def break_next(self, body: bytes, name: str) -> None:
        self.server.fault = name if name != "none" else None
        self.answer()

    def yaml(self, body: bytes) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        modes = [{"path": file["path"], "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else
                  "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
        self.answer({"files": modes})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [{**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
                   for one in json.loads(body)["objects"]]
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        size = int(self.headers["Content-Length"])
        if self.server.fault == "upload":
            self.rfile.read(size // 2)
            self.close_connection = True
            return self.connection.close()
        self.server.uploads[oid] = self.rfile.read(size)
        self.answer()

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if self.server.fault == "commit":
            return self.refuse(400, "BadRequest")
        files = dict(self.server.files[self.revision(repo, revision)])
        for line in body.splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
            elif one["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.server.commit(repo, revision, files)
        self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None})


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    (r"POST /fault/(?P<name>\w+)", Handler.break_next),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.yaml),
    (rf"POST /api/models/{REPO}/branch/(?P<name>.+)", Handler.branch),
    (rf"POST /api/models/{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (rf"POST /api/models/{REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", Handler.put),
    (rf"GET /api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    (rf"GET /api/models/{REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    (rf"(?:GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
