"""A hub on loopback: the few endpoints that huggingface_hub asks for files, commits and branches of models."""

import base64
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote


class FakeHub:
    """Repositories as data: repo -> {"refs": {branch: commit}, "commits": {commit: {file: bytes}}}."""

    def __init__(self):
        self.repositories, self.requests, self.gated, self.token = {}, [], set(), None
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def create(self, repo):
        self.repositories[repo] = {"refs": {}, "commits": {}}
        return self.put(repo, {".gitattributes": b""})

    def put(self, repo, files, branch="main"):
        """Commit files on top of a branch; returns the commit."""
        held = self.repositories[repo]
        merged = {**held["commits"].get(held["refs"].get(branch), {}), **files}
        commit = hashlib.sha1(repr((branch, sorted(merged.items()))).encode()).hexdigest()
        held["commits"][commit], held["refs"][branch] = merged, commit
        return commit

    def text(self, repo, name, branch="main"):
        held = self.repositories[repo]
        return held["commits"][held["refs"][branch]][name].decode()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {self.path}")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*map(unquote, found.groups()))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+)(?:/(.+))?)?", path):
            return self._model(*(unquote(group or "") for group in found.groups()), body)
        return self._error(404, "", "not in the fake hub")

    def _create(self, asked):
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._error(401, "", "Invalid username or password.")
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        status = 409 if repo in self.hub.repositories else 200
        if status == 200:
            self.hub.create(repo)
            self.hub.repositories[repo]["private"] = asked.get("private") or asked.get("visibility") == "private"
        return self._json({"url": f"{self.hub.url}/{repo}", "id": repo}, status)

    def _commit_of(self, repo, revision):
        """The commit meant; answers with an error, and None, where there is none."""
        held = self.hub.repositories.get(repo)
        if held is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        if repo in self.hub.gated:
            return self._error(403, "GatedRepo", "Access to this repository is restricted")
        commit = revision if revision in held["commits"] else held["refs"].get(revision)
        return commit or self._error(404, "RevisionNotFound", "Invalid rev id")

    def _file(self, repo, revision, name):
        if (commit := self._commit_of(repo, revision)) is None:
            return None
        content = self.hub.repositories[repo]["commits"][commit].get(name)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._send(200, content, {"X-Repo-Commit": commit, "ETag": etag})

    def _model(self, repo, what, revision, folder, body):
        if what == "branch":
            held = self.hub.repositories[repo]
            status = 409 if revision in held["refs"] else 200
            held["refs"].setdefault(revision, held["refs"]["main"])
            return self._json({}, status)
        revision = revision or "main"
        if (commit := self._commit_of(repo, revision)) is None:
            return None
        files = self.hub.repositories[repo]["commits"][commit]
        if what == "tree" and folder:
            return self._error(404, "EntryNotFound", "no folders here")
        if what == "tree":
            return self._json([{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()])
        if what == "preupload":
            asked = json.loads(body)["files"]
            return self._json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        if what == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            written = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            proposed = "create_pr=1" in self.path
            made = self.hub.put(repo, written, "refs/pr/1" if proposed else revision)
            more = {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/1"} if proposed else {}
            return self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{made}", "commitOid": made, **more})
        return self._json({"id": repo, "sha": commit, "siblings": [{"rfilename": n} for n in files], "tags": []})

    def _json(self, data, status=200):
        return self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _error(self, status, code, message, headers=None):
        return self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
