"""A small Hub on a socket: the part of the Hub's HTTP interface that huggingface_hub uses to push and to load models.

Start it in a thread and point ``HF_ENDPOINT`` at ``server.url``. Repositories, commits and blobs are stored in a
folder, so what was pushed can be searched on the disk. There is no xet here: uploads are plain files in the commit, or
LFS.

    with HubServer(folder, {"a-token": User("alice")}) as server:
        server.fail(r"PUT /lfs/", status=503, times=2)
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".pt")


@dataclass
class User:
    name: str
    role: str = "write"  # or "read"
    organizations: tuple[str, ...] = ()  # those it may write to


@dataclass
class Fault:
    """What happens instead of an answer to requests that match, ``times`` times."""

    pattern: str
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None  # bytes of the body that are read before the connection is cut
    delay: float = 0.0  # seconds before the answer, or before the fault


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, users: dict[str, User]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.users = Path(folder), users
        self.blobs = self.folder / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        state = self.folder / "repos.json"
        self.repos: dict[str, dict[str, Any]] = json.loads(state.read_text()) if state.exists() else {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # "METHOD /path" in the order of arrival
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is part of the tests

    def fail(self, pattern: str, times: int = 1_000_000, **what: Any) -> Fault:
        """From now on, requests whose "METHOD /path" matches get the fault."""
        self.faults.append(Fault(pattern, times, **what))
        return self.faults[-1]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What the revision holds."""
        commit = self.commit(self.repos[repo_id], revision)
        return {path: self.blob(entry["sha256"]).read_bytes() for path, entry in commit["files"].items()}

    def titles(self, repo_id: str, revision: str = "main") -> list[str]:
        """The commit messages, newest first."""
        repo, titles = self.repos[repo_id], []
        oid = repo["refs"].get(revision)
        while oid:
            titles.append(repo["commits"][oid]["title"])
            oid = repo["commits"][oid]["parent"]
        return titles

    # what the handler builds on

    def blob(self, sha256: str) -> Path:
        return self.blobs / sha256

    def store(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blob(sha256).write_bytes(content)
        return sha256

    def create(self, repo_id: str, private: bool) -> None:
        root = {"parent": None, "title": "initial commit", "files": {}}
        self.repos[repo_id] = {"private": private, "refs": {"main": "0" * 40}, "commits": {"0" * 40: root}}
        self.save()

    def save(self) -> None:
        (self.folder / "repos.json").write_text(json.dumps(self.repos))

    def commit(self, repo: dict[str, Any], revision: str) -> dict[str, Any]:
        oid = self.resolve(repo, revision)
        return repo["commits"][oid] | {"oid": oid}

    def resolve(self, repo: dict[str, Any], revision: str) -> str:
        oid = repo["refs"].get(revision, revision)
        if oid not in repo["commits"]:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query, self.route = parse_qs(url.query), unquote(url.path)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {self.route}")
            fault = next(
                (f for f in self.server.faults if f.times and re.search(f.pattern, self.server.requests[-1])), None
            )
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.delay:
            time.sleep(fault.delay)
        if fault is not None and fault.drop_after is not None:
            self.rfile.read(min(fault.drop_after, int(self.headers.get("Content-Length", 0))))
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.read_body()
        if fault is not None and fault.status is not None:
            return self.answer(fault.status, {"error": "injected"}, fault.headers)
        try:
            self.user = self.authenticate()
            for method, pattern, function in ROUTES:
                found = re.fullmatch(pattern, self.route)
                if found and self.command in method:
                    with self.server.lock:
                        return function(self, **found.groupdict())
            raise Refusal(404, f"no such endpoint: {self.command} {self.route}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.answer(refusal.status, {"error": refusal.message}, headers)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        raw = isinstance(content, bytes)
        body = content if raw else json.dumps(content).encode()
        headers = {"Content-Type": "application/octet-stream" if raw else "application/json"} | (headers or {})
        with contextlib.suppress(OSError):  # the client may have given up
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    # who may do what

    def authenticate(self) -> User | None:
        header = self.headers.get("Authorization")
        if header is None or self.route.startswith("/lfs/"):
            return None
        user = self.server.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def may_write(self, owner: str) -> bool:
        user = self.user
        return user is not None and user.role == "write" and (owner == user.name or owner in user.organizations)

    def repository(self, repo: str, write: bool = False) -> dict[str, Any]:
        found, owner = self.server.repos.get(repo), repo.split("/")[0]
        related = self.user is not None and (owner == self.user.name or owner in self.user.organizations)
        if found is None or (found["private"] and not related):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not self.may_write(owner):
            raise Refusal(403 if self.user else 401, f"You don't have the rights to write to {repo}")
        return found

    # the endpoints

    def whoami(self) -> None:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        organizations = [{"name": name, "type": "org"} for name in self.user.organizations]
        token = {"accessToken": {"displayName": "test", "role": self.user.role}, "type": "access_token"}
        self.answer(200, {"type": "user", "name": self.user.name, "orgs": organizations, "auth": token})

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        owner = wanted.get("organization") or self.user.name
        repo_id = f"{owner}/{wanted['name']}"
        if not self.may_write(owner):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        content = {"url": f"{self.server.url}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repos:
            return self.answer(409, content | {"error": "You already created this model repo"})
        self.server.create(repo_id, private=wanted.get("visibility") == "private" or wanted.get("private", False))
        self.answer(200, content)

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        errors = [{"message": message} for message in card_errors(content)]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def auth_check(self, repo: str) -> None:
        self.repository(repo, write=self.route.endswith("/write"))
        self.answer(200, {})

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.repository(repo)
        commit = self.server.commit(found, revision)
        siblings = [{"rfilename": path} for path in commit["files"]]
        tags: list[str] = []
        self.answer(
            200, {"id": repo, "sha": commit["oid"], "private": found["private"], "siblings": siblings, "tags": tags}
        )

    def tree(self, repo: str, revision: str, path: str | None = None) -> None:
        files = self.server.commit(self.repository(repo), revision)["files"]
        prefix = f"{path.strip('/')}/" if path and path.strip("/") else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        inside = {name: entry for name, entry in files.items() if name.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        folders = {prefix + name[len(prefix) :].split("/")[0] for name in inside if "/" in name[len(prefix) :]}
        entries = [
            describe(name, entry) for name, entry in inside.items() if recursive or "/" not in name[len(prefix) :]
        ]
        self.answer(
            200, [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders] + entries
        )

    def paths_info(self, repo: str, revision: str) -> None:
        files = self.server.commit(self.repository(repo), revision)["files"]
        wanted = parse_qs(self.body.decode()).get("paths", [])
        self.answer(200, [describe(path, files[path]) for path in wanted if path in files])

    def refs(self, repo: str) -> None:
        found = self.repository(repo)["refs"]
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in found.items()]
        self.answer(200, {"branches": branches, "converts": [], "tags": []})

    def create_branch(self, repo: str, branch: str) -> None:
        found = self.repository(repo, write=True)
        if branch in found["refs"]:
            raise Refusal(409, f"Reference already exists: {branch}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found["refs"][branch] = self.server.resolve(found, start)
        self.server.save()
        self.answer(200, {})

    def preupload(self, repo: str, revision: str) -> None:
        files = self.server.commit(self.repository(repo, write=True), revision)["files"]
        answers = []
        for file in json.loads(self.body)["files"]:
            there, mode = files.get(file["path"]), "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            oid = (there["sha256"] if there["lfs"] else there["oid"]) if there else None
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answers})

    def lfs_batch(self, repo: str) -> None:
        commits = self.repository(repo, write=True)["commits"].values()
        here = {entry["sha256"] for commit in commits for entry in commit["files"].values()}
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}}
            verify = {"href": f"{self.server.url}/lfs/{wanted['oid']}/verify"}
            objects.append(
                wanted if wanted["oid"] in here else wanted | {"actions": {"upload": upload, "verify": verify}}
            )
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have the announced hash")
        self.server.store(self.body)
        self.answer(200, b"", {"ETag": f'"{oid}"'})

    def lfs_verify(self, oid: str) -> None:
        blob, wanted = self.server.blob(oid), json.loads(self.body)
        if not blob.exists() or blob.stat().st_size != wanted["size"]:
            raise Refusal(404, "the object was not uploaded")
        self.answer(200, {})

    def commit(self, repo: str, revision: str) -> None:
        found = self.repository(repo, write=True)
        if revision not in found["refs"]:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        parent = found["refs"][revision]
        files, title = dict(found["commits"][parent]["files"]), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = self.plain(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = self.large(value["oid"])
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: entry for path, entry in files.items() if not path.startswith(folder)}
            else:
                raise Refusal(400, f"unknown operation {key}")
        oid = hashlib.sha1(self.body + parent.encode()).hexdigest()
        found["commits"][oid] = {"parent": parent, "title": title, "files": files}
        found["refs"][revision] = oid
        self.server.save()
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

    def plain(self, content: bytes) -> dict[str, Any]:
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"oid": git, "sha256": self.server.store(content), "size": len(content), "lfs": False}

    def large(self, oid: str) -> dict[str, Any]:
        blob = self.server.blob(oid)
        if not blob.exists():
            raise Refusal(400, f"LFS object {oid} was never uploaded")
        return {"oid": oid[:40], "sha256": oid, "size": blob.stat().st_size, "lfs": True}

    def download(self, repo: str, revision: str, path: str) -> None:
        commit = self.server.commit(self.repository(repo), revision)
        entry = commit["files"].get(path)
        headers = {"X-Repo-Commit": commit["oid"]}
        if entry is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer(404, {"error": "Entry not found"}, headers)
        etag = entry["sha256"] if entry["lfs"] else entry["oid"]
        headers |= {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if entry["lfs"]:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(entry["size"])}
        content, status = self.server.blob(entry["sha256"]).read_bytes(), 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self.answer(status, content, headers)


def describe(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    lfs = {"lfs": {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 134}} if entry["lfs"] else {}
    return {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]} | lfs


def card_errors(content: str) -> list[str]:
    """What the Hub says about a card's metadata, as far as the model-index goes."""
    front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if front is None:
        return ["there is no metadata block"]
    try:
        metadata = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        return [str(error)]
    errors = []
    for model in metadata.get("model-index", []):
        if not model.get("name"):
            errors.append('"model-index[].name" is required')
        for result in model.get("results", [{}]):
            if not result.get("task", {}).get("type"):
                errors.append('"model-index[].results[].task.type" is required')
            if not {"name", "type"} <= set(result.get("dataset", {})):
                errors.append('"model-index[].results[].dataset" needs name and type')
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(result.get("dataset", {}).get("type"))):
                errors.append('"model-index[].results[].dataset.type" must be a data set id')
            errors += [f"metric {metric} needs type and value" for metric in result.get("metrics", [{}])
                       if not metric.get("type") or not isinstance(metric.get("value"), (int, float))]  # fmt: skip
    return errors


REPO = r"(?P<repo>[^/]+/[^/]+?)"
API = rf"/api/models/{REPO}"
ROUTES = [
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create_repo),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("GET",), rf"{API}/auth-check(/write)?", _Handler.auth_check),
    (("GET",), rf"{API}", _Handler.info),
    (("GET",), rf"{API}/revision/(?P<revision>.+)", _Handler.info),
    (("GET",), rf"{API}/tree/(?P<revision>[^/]+)(?P<path>/.*)?", _Handler.tree),
    (("POST",), rf"{API}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    (("GET",), rf"{API}/refs", _Handler.refs),
    (("POST",), rf"{API}/branch/(?P<branch>.+)", _Handler.create_branch),
    (("POST",), rf"{API}/preupload/(?P<revision>.+)", _Handler.preupload),
    (("POST",), rf"{API}/commit/(?P<revision>.+)", _Handler.commit),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    (("POST",), "/lfs/(?P<oid>[0-9a-f]{64})/verify", _Handler.lfs_verify),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.download),
]
