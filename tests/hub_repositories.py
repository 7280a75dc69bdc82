"""Model repositories as `tests/hub.py` keeps them: in memory, every commit a snapshot of all files."""

from __future__ import annotations

import base64
import hashlib
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from typing import Any


# The Hub's own list for new repositories, less the formats that nothing here writes.
LARGE = "*.bin *.ckpt *.gz *.h5 *.msgpack *.npy *.npz *.onnx *.parquet *.pkl *.pt *.pth *.safetensors *.tar *.zip *tfevents*"
LARGE_FROM = 10 * 2**20


class Refusal(Exception):
    """An error status; `code` tells the client which of its exceptions to raise, `content` goes into the body."""

    def __init__(self, status: int, message: str, code: str | None = None, **content: str):
        super().__init__(message)
        self.status, self.message, self.code, self.content = status, message, code, content


@dataclass(frozen=True)
class File:
    """A file of a commit. Of a `large` one (LFS), git keeps a pointer with the SHA-256 of its content."""

    data: bytes
    large: bool

    @property
    def etag(self) -> str:
        """What the client compares and caches by: the SHA-256 of a large file, git's id of any other."""
        return hashlib.sha256(self.data).hexdigest() if self.large else self.kept()[0]

    def kept(self) -> tuple[str, int]:
        """Git's id and the size of what git keeps."""
        kept = self.data
        if self.large:
            kept = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.etag}\nsize {len(kept)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest(), len(kept)

    def listing(self, path: str) -> dict[str, Any]:
        """The file as an entry of its folder."""
        oid, kept = self.kept()
        large = {"lfs": {"oid": self.etag, "size": len(self.data), "pointerSize": kept}} if self.large else {}
        return {"type": "file", "path": path, "oid": oid, "size": len(self.data), **large}


@dataclass(frozen=True)
class Commit:
    """A snapshot of all files."""

    title: str
    files: dict[str, File]
    parent: Commit | None = None
    text: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(20))
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    def history(self) -> list[Commit]:
        """This commit and those before it, newest first."""
        return [self, *(self.parent.history() if self.parent else [])]

    def listings(self, folder: str = "", recursive: bool = True) -> list[dict[str, Any]]:
        """The files and folders that a folder holds, "" for the root. The ids of folders are not git's."""
        prefix, entries = f"{folder}/" if folder else "", {}
        for path in sorted(path for path in self.files if path.startswith(prefix)):
            names = path.removeprefix(prefix).split("/")
            folders = [prefix + "/".join(names[:depth]) for depth in range(1, len(names))]
            for name in folders if recursive else folders[:1]:
                entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            if recursive or not folders:
                entries[path] = self.files[path].listing(path)
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist on this revision", "EntryNotFound")
        return list(entries.values())


@dataclass
class Repository:
    """Branches, and uploads by their SHA-256: the sizes of those to come, the contents of those that came."""

    name: str
    private: bool
    branches: dict[str, Commit] = field(init=False)
    expected: dict[str, int] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self):
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE.split())
        self.branches = {"main": Commit("initial commit", {".gitattributes": File(attributes.encode(), large=False)})}

    def find(self, revision: str) -> Commit:
        """The commit that a branch points to, or that has this id."""
        commits = {commit.id: commit for head in self.branches.values() for commit in head.history()}
        commit = self.branches.get(revision) or commits.get(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def head(self, branch: str) -> Commit:
        """The newest commit of a branch, which is what a new commit can follow."""
        if branch not in self.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return self.branches[branch]

    def takes_as_large(self, branch: str, path: str, size: int) -> bool:
        """Whether a file is to be uploaded as a large one: by its name, as `.gitattributes` has it, or by its size."""
        attributes = self.head(branch).files.get(".gitattributes", File(b"", large=False)).data.decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        return size > LARGE_FROM or any(fnmatch(path, pattern) for pattern in patterns)

    def upload(self, oid: str, data: bytes) -> None:
        """Take the content of a large file that was announced before."""
        if oid not in self.expected:
            raise Refusal(403, f"Expected an object that was announced by a batch request, got {oid}")
        came = hashlib.sha256(data).hexdigest()
        if (came, len(data)) != (oid, self.expected[oid]):
            raise Refusal(400, f"Expected {self.expected[oid]} bytes with SHA-256 {oid}, got {len(data)} with {came}")
        self.uploads[oid] = data

    def apply(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        """Carry out one operation of a commit on `files`."""
        path = value["path"]
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]), large=False)
            if len(files[path].data) > LARGE_FROM:
                raise Refusal(400, f"Expected {path} as a large file: a regular one has {LARGE_FROM} bytes at most")
        elif key == "lfsFile":
            if value["oid"] not in self.uploads:
                raise Refusal(400, f"An LFS pointer pointed to a file that does not exist. Offending file: {path}")
            files[path] = File(self.uploads[value["oid"]], large=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(folder))]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Refusal(501, f"tests/hub_repositories.py does not know the operation {key!r} of a commit")
