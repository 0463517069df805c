"""A server on loopback that speaks as much of the Hub's protocol as `huggingface_hub` needs to push and to load models.

    with Hub() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home)})

Repositories are kept in memory, a dictionary {path: bytes} a commit. `hub.fault` breaks what comes next: "upload" (the
connection ends within a file), "commit" (refused when all files are there), "download" (the connection ends in the
middle, once), "always" (each time); a client sets it by PUT /fault/NAME.
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
REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"


class Hub(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}  # of a commit
        self.heads: dict[str, dict[str, str]] = {}  # of a repository: branch -> commit
        self.private: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.fault: str | None = None
        self.ranges: list[str] = []  # what clients asked for to go on with a download

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What a client's process needs; its cache is in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "HF_TOKEN": token or "",
        }

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

    def answer(
        self, content: object = b"", status: int = 200, sent: int | None = None, **headers: object
    ) -> None:
        """`sent`: so many bytes, then the connection ends; None: all."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.close_connection |= sent is not None
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

    def refuse(self, status: int, code: str, **headers: object) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code, **headers)

    def handle_any(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.server
        body = (
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.command == "POST"
            else b""
        )
        asked = f"{self.command} {path}"
        match, method = next(
            (
                (match, method)
                for pattern, method in ROUTES
                if (match := re.fullmatch(pattern, asked))
            ),
            (None, None),
        )
        if match is None:
            return self.refuse(404, "EntryNotFound")
        found = {"body": body, **match.groupdict()}
        reads = self.command in ("GET", "HEAD") and found.get("repo") not in hub.private
        if (
            not reads
            and self.command != "PUT"
            and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            return self.refuse(401, "RepoNotFound" if "repo" in found else "Unauthorized")
        if "repo" in found:
            if found["repo"] not in hub.heads:
                return self.refuse(401, "RepoNotFound")
            revision = found.setdefault("revision", None) or "main"
            found["revision"] = sha = (
                revision if revision in hub.files else hub.heads[found["repo"]].get(revision)
            )
            found["branch"] = found.get("branch", revision)
            if sha is None:
                return self.refuse(404, "RevisionNotFound")
        method(self, **found)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo, known = f"{asked.get('organization') or 'user'}/{asked['name']}", self.server.heads
        if repo not in known and (asked.get("private") or asked.get("visibility") == "private"):
            self.server.private.add(repo)
        status = 409 if repo in known else 200
        if status == 200:
            self.server.commit(repo, "main", {})
        self.answer({"url": f"{self.server.url}/{repo}"}, status)

    def make_branch(self, body: bytes, repo: str, branch: str, revision: str) -> None:
        if branch in self.server.heads[repo]:
            return self.refuse(409, "BranchExists")
        self.server.heads[repo][branch] = revision
        self.answer({})

    def info(self, body: bytes, repo: str, branch: str, revision: str) -> None:
        self.answer(
            {
                "id": repo,
                "sha": revision,
                "private": repo in self.server.private,
                "tags": [],
                "siblings": [{"rfilename": path} for path in self.server.files[revision]],
            }
        )

    def tree(self, body: bytes, repo: str, branch: str, revision: str) -> None:
        self.answer(
            [
                {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for path, content in self.server.files[revision].items()
            ]
        )

    def resolve(self, body: bytes, repo: str, branch: str, revision: str, path: str) -> None:
        if (content := self.server.files[revision].get(path)) is None:
            return self.refuse(404, "EntryNotFound", X_Repo_Commit=revision)
        start, partial, sent = 0, {}, None
        if asked := self.headers.get("Range"):
            self.server.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            partial = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        if (
            self.command == "GET"
            and self.server.fault in ("download", "always")
            and path.endswith("safetensors")
        ):
            self.server.fault = None if self.server.fault == "download" else "always"
            sent = (len(content) - start) // 2
        self.answer(
            content[start:],
            206 if asked else 200,
            sent,
            ETag=f'"{hashlib.sha256(content).hexdigest()}"',
            X_Repo_Commit=revision,
            Accept_Ranges="bytes",
            **partial,
        )

    def break_next(self, body: bytes, name: str) -> None:
        self.server.fault = name if name != "none" else None
        self.answer()

    def validate(self, body: bytes) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, branch: str, revision: str) -> None:
        self.answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "shouldIgnore": False,
                        "uploadMode": "lfs"
                        if file["path"].endswith((".safetensors", ".png"))
                        else "regular",
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def batch(self, body: bytes, repo: str, branch: str, revision: str) -> None:
        self.answer(
            {
                "transfer": "basic",
                "objects": [
                    {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ],
            }
        )

    def put(self, body: bytes, oid: str) -> None:
        size = int(self.headers["Content-Length"])
        if self.server.fault == "upload":
            self.rfile.read(size // 2)
            self.close_connection = True
            return self.connection.close()
        self.server.uploads[oid] = self.rfile.read(size)
        self.answer()

    def commit(self, body: bytes, repo: str, branch: str, revision: str) -> None:
        if self.server.fault == "commit":
            return self.refuse(400, "BadRequest")
        files = dict(self.server.files[revision])
        for key, value in (
            (one["key"], one["value"]) for one in map(json.loads, body.splitlines())
        ):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = self.server.commit(repo, branch, files)
        self.answer(
            {
                "commitUrl": f"{self.server.url}/{repo}/commit/{sha}",
                "commitOid": sha,
                "pullRequestUrl": None,
            }
        )


ROUTES = [
    (r"PUT /fault/(?P<name>\w+)", Handler.break_next),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{REPO}/branch/(?P<branch>.+)", Handler.make_branch),
    (rf"POST /api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    (rf"POST /api/models/{REPO}/commit/{REVISION}", Handler.commit),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", Handler.put),
    (rf"GET /api/models/{REPO}(?:/revision/{REVISION})?", Handler.info),
    (rf"GET /api/models/{REPO}/tree/{REVISION}", Handler.tree),
    (rf"(?:GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
