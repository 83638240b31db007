"""A Hub of our own on 127.0.0.1, which speaks the download protocol and counts."""

import hashlib
import json
import re
from collections import Counter
from contextlib import suppress
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from tp2d_lib.integrity import digest

API = re.compile(r"/api/models/([^/]+/[^/?]+)(/(revision|tree)/([^/?]+))?(\?.*)?")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
GATED, MISSING = {"X-Error-Code": "GatedRepo"}, {"X-Error-Code": "RepoNotFound"}


class Repository:
    """The files of a folder, at one commit.

    Set ``refusal`` to the status and headers that answer every request for it, and
    ``answers`` of a file to what its next downloads do: "cut" half way, or a status.
    """

    def __init__(self, name: str, folder: str | Path):
        self.commit = hashlib.sha1(name.encode()).hexdigest()
        self.folder = Path(folder)
        self.refusal: tuple[int, dict] | None = None
        self.answers: dict[str, list] = {}
        self.requests: list[tuple[str, str, str | None]] = []

    @cached_property
    def files(self) -> dict[str, Path]:
        paths = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(self.folder)): path for path in paths}

    def downloads(self) -> Counter:
        """How often each file was requested as a whole, or resumed; forgets them."""
        parts = ("bytes=0-100000",)  # get_safetensors_metadata reads a header
        seen = [
            file
            for method, file, part in self.requests
            if method == "GET" and part not in parts
        ]
        self.requests.clear()
        return Counter(seen)


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()

    def add(self, name: str, folder: str | Path) -> Repository:
        self.repositories[name] = Repository(name, folder)
        return self.repositories[name]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        api, file = API.fullmatch(self.path), FILE.fullmatch(self.path)
        if api is file is None:  # of a folder, or of what only the real Hub has
            return self.reply(404, {"X-Error-Code": "EntryNotFound"})
        repository = self.server.repositories.get((api or file)[1])
        if repository is None:
            return self.reply(404, MISSING)
        if repository.refusal and file:
            return self.reply(*repository.refusal)
        revision = (api[4] if api else file[2]) or "main"
        if revision not in ("main", repository.commit):
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        if file:
            return self.send_file(repository, file[3])
        files = [describe(*item) for item in repository.files.items()]
        if api[3] != "tree":
            files = {"id": api[1], "sha": repository.commit, "siblings": files}
        return self.reply(200, {}, json.dumps(files).encode())

    def send_file(self, repository: Repository, name: str):
        part = self.headers["Range"]
        repository.requests.append((self.command, name, part))
        headers = {"X-Repo-Commit": repository.commit}
        if name not in repository.files:
            return self.reply(404, {**headers, "X-Error-Code": "EntryNotFound"})
        path = repository.files[name]
        headers["ETag"] = f'"{digest(path)}"'
        body, answers = path.read_bytes(), repository.answers.get(name)
        if self.command == "GET" and answers:
            if (answer := answers.pop(0)) != "cut":
                return self.reply(answer, headers)
            return self.reply(200, headers, body, cut=len(body) // 2)
        if part is None:
            return self.reply(200, headers, body)
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", part).groups()
        end = min(int(last or len(body)), len(body) - 1)
        headers["Content-Range"] = f"bytes {first}-{end}/{len(body)}"
        return self.reply(206, headers, body[int(first) : end + 1])

    def reply(self, status: int, headers: dict, body: bytes = b"", cut=None):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):
                self.wfile.write(body[:cut])
        self.close_connection = cut is not None


def describe(name: str, path: Path) -> dict:
    """A file, as the Hub lists it among a model's and in its tree."""
    size, sha = path.stat().st_size, digest(path)
    lfs = {"size": size, "sha256": sha, "oid": sha, "pointerSize": 1}
    about = {"type": "file", "path": name, "rfilename": name, "size": size, "oid": sha}
    return {**about, "lfs": lfs} if name.endswith(".safetensors") else about
