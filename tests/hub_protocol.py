"""The addresses of the Hub that `tests/hub.py` serves, and what they answer.

Statuses, headers and messages are those by which huggingface_hub tells one error from another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from tests.hub_repositories import Commit, Refusal, Repository


USER = "user"
GROUPS = {"repo": "[^/]+/[^/]+?", "path": ".+"}
ROUTES: list[tuple[str, re.Pattern, bool, Callable]] = []


@dataclass
class Request:
    """What a client asked for. `path` is unquoted and has no query; `status` is that of the answer, None without one."""

    method: str
    path: str
    query: dict[str, str]
    token: str | None
    agent: str
    body: bytes = field(repr=False)
    status: int | None = None


@dataclass(frozen=True)
class Answer:
    """What goes back. `share` is the part of the body, in [0, 1], after which the connection is closed."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    share: float = 1.0


def error(refusal: Refusal) -> Answer:
    """A refusal as an answer; its message is a header too, since the answer to HEAD has no body."""
    headers = {"X-Error-Message": refusal.message, **({"X-Error-Code": refusal.code} if refusal.code else {})}
    return Answer(refusal.status, json.dumps({"error": refusal.message, **refusal.content}).encode(), headers)


def route(method: str, pattern: str, *, write: bool = False) -> Callable:
    """Register a method of `Answers` for an address; it gets what stands for the names in braces."""
    regex = re.sub(r"\\{(\w+)\\}", lambda name: f"(?P<{name[1]}>{GROUPS.get(name[1], '[^/]+')})", re.escape(pattern))

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(regex), write, function))
        return function

    return register


class Answers:
    """The repositories of a hub, and its answer to each request. What `write` routes change is up to the token's owner."""

    def __init__(self, url: str, token: str):
        self.url, self.token = url, token
        self.repositories: dict[str, Repository] = {}

    def to(self, request: Request, address: str) -> Answer:
        """Carry out a request; `address` is its path as it came, quoted."""
        try:
            if request.token not in (None, self.token):
                raise Refusal(401, "Invalid credentials in Authorization header")
            for method, regex, write, function in ROUTES:
                if method == request.method and (match := regex.fullmatch(address)):
                    names: dict[str, Any] = {name: unquote(value) for name, value in match.groupdict().items()}
                    if "repo" in names:
                        names["repo"] = self.find(names["repo"], request.token, write)
                    content = function(self, request, **names)
                    return content if isinstance(content, Answer) else Answer(200, json.dumps(content).encode())
            raise Refusal(501, f"tests/hub_protocol.py has no answer to {request.method} {request.path}")
        except Refusal as refusal:
            return error(refusal)

    def find(self, name: str, token: str | None, write: bool) -> Repository:
        """The repository, if whoever has this token may see it, or write to it. The Hub does not say which it was."""
        repo = self.repositories.get(name)
        if token is None and (write or repo is None or repo.private):
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if repo is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> dict[str, Any]:
        if request.token is None:
            raise Refusal(401, "Invalid username or password.")
        access = {"accessToken": {"displayName": "tests", "role": "write"}}
        return {
            "type": "user",
            "id": "0" * 24,
            "name": USER,
            "fullname": USER,
            "isPro": False,
            "orgs": [],
            "auth": access,
        }

    @route("POST", "/api/repos/create")
    def create(self, request: Request) -> dict[str, Any]:
        wanted = json.loads(request.body)
        owner, name = wanted.get("organization") or USER, wanted["name"]
        if request.token is None:
            raise Refusal(401, "Invalid username or password.")
        if wanted.get("type", "model") != "model":
            raise Refusal(501, f"tests/hub_protocol.py keeps models only, got a {wanted['type']}")
        if owner != USER:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{name}"
        if repo_id in self.repositories:
            raise Refusal(409, "You already created this model repo", url=f"{self.url}/{repo_id}")
        self.repositories[repo_id] = Repository(repo_id, wanted.get("visibility") == "private")
        return {"url": f"{self.url}/{repo_id}", "name": repo_id}

    @route("POST", "/api/models/{repo}/branch/{branch}", write=True)
    def create_branch(self, request: Request, repo: Repository, branch: str) -> dict[str, Any]:
        if branch in repo.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.find(json.loads(request.body).get("startingPoint", "main"))
        return {}

    @route("POST", "/api/validate-yaml")
    def validate_card(self, request: Request) -> dict[str, Any]:
        bare = not json.loads(request.body)["content"].startswith("---")
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}] if bare else []}

    @route("POST", "/api/models/{repo}/preupload/{branch}", write=True)
    def preupload(self, request: Request, repo: Repository, branch: str) -> dict[str, Any]:
        wanted, present, files = json.loads(request.body), repo.head(branch).files, []
        if "gitIgnore" in wanted:
            raise Refusal(501, "tests/hub_protocol.py does not read .gitignore")
        for file in wanted["files"]:
            mode = "lfs" if repo.takes_as_large(branch, file["path"], file["size"]) else "regular"
            oid = present[file["path"]].etag if file["path"] in present else None
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    @route("POST", "/{repo}.git/info/lfs/objects/batch", write=True)
    def batch(self, request: Request, repo: Repository) -> dict[str, Any]:
        objects = json.loads(request.body)["objects"]
        for wanted in objects:
            oid = wanted["oid"]
            if oid not in repo.uploads:
                repo.expected[oid] = wanted["size"]
                verify = {"href": f"{self.url}/{repo.name}.git/info/lfs/objects/verify", "header": {}}
                wanted["actions"] = {
                    "upload": {"href": f"{self.url}/{repo.name}/lfs/{oid}", "header": {}},
                    "verify": verify,
                }
        return {"transfer": "basic", "objects": objects}

    # No `write`: the client sends no token along, since on the Hub this is a signed address of another host.
    @route("PUT", "/{owner}/{name}/lfs/{oid}")
    def upload(self, request: Request, owner: str, name: str, oid: str) -> dict[str, Any]:
        self.find(f"{owner}/{name}", self.token, write=True).upload(oid, request.body)
        return {}

    @route("POST", "/{repo}.git/info/lfs/objects/verify", write=True)
    def verify(self, request: Request, repo: Repository) -> dict[str, Any]:
        wanted = json.loads(request.body)
        if len(repo.uploads.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, f"Expected {wanted['size']} bytes to have been uploaded as {wanted['oid']}")
        return {}

    @route("POST", "/api/models/{repo}/commit/{branch}", write=True)
    def commit(self, request: Request, repo: Repository, branch: str) -> dict[str, Any]:
        if request.query.get("create_pr"):
            raise Refusal(501, "tests/hub_protocol.py has no pull requests")
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        parent, wanted = repo.head(branch), header["value"]
        if not parent.id.startswith(wanted.get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            repo.apply(files, operation["key"], operation["value"])
        commit = repo.branches[branch] = Commit(wanted["summary"], files, parent, wanted["description"])
        return {"success": True, "commitOid": commit.id, "commitUrl": f"{self.url}/{repo.name}/commit/{commit.id}"}

    @route("GET", "/api/models/{repo}")
    @route("GET", "/api/models/{repo}/revision/{revision}")
    def info(self, request: Request, repo: Repository, revision: str = "main") -> dict[str, Any]:
        commit = repo.find(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in request.query:
            for sibling in siblings:
                entry = commit.files[sibling["rfilename"]].listing(sibling["rfilename"])
                lfs = {"lfs": {**entry["lfs"], "sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {}
                sibling |= {"size": entry["size"], "blobId": entry["oid"], **lfs}
        about = {"private": repo.private, "gated": False, "disabled": False, "tags": [], "siblings": siblings}
        dates = {"lastModified": commit.date, "createdAt": commit.history()[-1].date}
        return {"id": repo.name, "modelId": repo.name, "author": USER, "sha": commit.id, **dates, **about}

    @route("GET", "/api/models/{repo}/tree/{revision}")
    @route("GET", "/api/models/{repo}/tree/{revision}/{path}")
    def tree(self, request: Request, repo: Repository, revision: str, path: str = "") -> list[dict[str, Any]]:
        return repo.find(revision).listings(path, recursive=request.query.get("recursive") == "true")

    @route("GET", "/api/models/{repo}/commits/{revision}")
    def history(self, request: Request, repo: Repository, revision: str) -> list[dict[str, Any]]:
        return [
            {
                "id": commit.id,
                "title": commit.title,
                "message": commit.text,
                "authors": [{"user": USER}],
                "date": commit.date,
            }
            for commit in repo.find(revision).history()
        ]

    @route("GET", "/api/models/{repo}/refs")
    def references(self, request: Request, repo: Repository) -> dict[str, Any]:
        heads = {name: commit.id for name, commit in repo.branches.items()}
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": head} for name, head in heads.items()]
        return {"branches": branches, "converts": [], "tags": []}

    @route("HEAD", "/{repo}/resolve/{revision}/{path}")
    @route("GET", "/{repo}/resolve/{revision}/{path}")
    def resolve(self, request: Request, repo: Repository, revision: str, path: str) -> Answer:
        commit = repo.find(revision)
        headers = {"X-Repo-Commit": commit.id}
        file = commit.files.get(path)
        if file is None:
            answer = error(Refusal(404, "Entry not found", "EntryNotFound"))
            return Answer(answer.status, answer.body, {**answer.headers, **headers})
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        return Answer(200, file.data, {"ETag": f'"{file.etag}"', **headers})
