"""A stand-in for the Hugging Face hub: its HTTP API as far as uploads and downloads of models use it.

Large files come by Git LFS, as for clients without Xet. Every repository has one branch, of which the latest state is
kept.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".mp4", ".png", ".pth")


@dataclass
class Repo:
    """Files by path, and how the repository was made."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self):
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


@dataclass
class Hub:
    """What the server holds, and what it lets happen.

    Attributes:
      role: of the token; "fineGrained" may write, unless `refused`.
      refused: (verb, pattern of a path): answered with 403.
      failing: (verb, pattern of a path): answered with 500.
      requests: what was asked for.
    """

    url: str = ""
    token: str = "hf_secret"
    user: str = "me"
    orgs: tuple[str, ...] = ("lab",)
    role: str = "write"
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    refused: tuple[str, str] | None = None
    failing: tuple[str, str] | None = None
    requests: list[tuple[str, str]] = field(default_factory=list)

    def asked(self, verb, pattern):
        return [path for one, path in self.requests if one == verb and re.search(pattern, path)]


def etag(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value=None, status=200, body=None, headers=None):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status, message, code=None):
        headers = {"X-Error-Message": message, **({} if code is None else {"X-Error-Code": code})}
        self.answer({"error": message}, status, headers=headers)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def handle_any(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.hub.requests.append((self.command, path))
        for rule, status, message in (
            (self.hub.refused, 403, "Forbidden: you must use a write token to upload to a repository."),
            (self.hub.failing, 500, "Internal Error"),
        ):
            if rule is not None and rule[0] == self.command and re.search(rule[1], path):
                return self.error(status, message)
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if not known and (self.command != "HEAD" and not path.startswith("/upload/")):
            return self.error(401, "Invalid credentials in Authorization header")
        return self.route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def route(self, path, body):
        if path == "/api/whoami-v2":
            orgs = [{"name": name, "roleInOrg": "write"} for name in self.hub.orgs]
            auth = {"type": "access_token", "accessToken": {"displayName": "token", "role": self.hub.role}}
            return self.answer({"type": "user", "name": self.hub.user, "orgs": orgs, "auth": auth})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/upload/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.hub.blobs[match[1]] = body
            return self.answer({})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+)(?:/.*)?)?", path):
            return self.api(match[1], match[2], body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body)["objects"])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.resolve(match[1], match[2])
        return self.error(404, "no such page")

    def create(self, asked):
        owner = asked.get("organization") or self.hub.user
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repos:
            return self.answer({"url": f"{self.hub.url}/{name}", "error": "exists"}, 409)
        if owner not in (self.hub.user, *self.hub.orgs) or self.hub.role == "read":
            return self.error(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(private, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer({"url": f"{self.hub.url}/{name}"})

    def api(self, name, verb, body):
        repo = self.hub.repos.get(name)
        if repo is None:
            return self.error(404, "Repository not found", "RepoNotFound")
        if verb == "preupload":
            owner = name.partition("/")[0]
            if owner not in (self.hub.user, *self.hub.orgs):
                return self.error(403, "Forbidden: you must use a write token to upload to a repository.")
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": [{**file, "shouldIgnore": False} for file in files]})
        if verb == "commit":
            return self.commit(name, repo, [json.loads(line) for line in body.splitlines()])
        if verb == "tree":
            return self.answer(
                [
                    {"type": "file", "path": path, "oid": etag(content), "size": len(content)}
                    for path, content in repo.files.items()
                ]
            )
        siblings = [{"rfilename": path} for path in repo.files]
        return self.answer({"id": name, "sha": repo.sha, "private": repo.private, "siblings": siblings, "tags": []})

    def batch(self, objects):
        def told(one):
            found = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] in self.hub.blobs:
                return found
            href = {"href": f"{self.hub.url}/upload/{one['oid']}", "header": {}}
            return {**found, "actions": {"upload": href}}

        self.answer({"transfer": "basic", "objects": [told(one) for one in objects]})

    def commit(self, name, repo, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del repo.files[value["path"]]
        repo.commits.append(lines[0]["value"]["summary"])
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})

    def resolve(self, name, path):
        repo = self.hub.repos.get(name)
        if repo is None:
            return self.error(404, "Repository not found", "RepoNotFound")
        if path not in repo.files:
            return self.error(404, "Entry not found", "EntryNotFound")
        content = repo.files[path]
        self.answer(body=content, headers={"ETag": f'"{etag(content)}"', "X-Repo-Commit": repo.sha})


@contextmanager
def serving(**settings):
    """Serves a hub on this machine."""
    hub = Hub(**settings)
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub})) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
