"""What a Hub answers: from a request to a status, headers and a body. No sockets here.

Covered is what huggingface_hub asks when it reads a model repository:

    GET       /api/models/{repo}                        commit and file names of the main branch
    GET       /api/models/{repo}/revision/{revision}    the same of another revision
    GET       /api/models/{repo}/tree/{revision}[/dir]  files with sizes and object ids
    GET       /api/models/{repo}/refs                   branches
    GET HEAD  /{repo}/resolve/{revision}/{file}         content, whole or a byte range
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .catalog import DEFAULT_BRANCH, Catalog, HubRefusal, Repository, ServedFile, Snapshot

# A repository id is one path segment or two; the second must not be one of the API's own words.
_REPO = r"(?P<repo>[^/]+(?:/(?!(?:revision|tree|refs|resolve)(?:/|$))[^/]+)?)"
_BYTE_RANGE = re.compile(r"bytes=(?P<first>\d*)-(?P<last>\d*)")


@dataclass(frozen=True)
class HubRequest:
    """One request: the target as sent (path and query, percent-encoded), and headers with lower-case names."""

    target: str
    headers: Mapping[str, str]

    @property
    def token(self) -> str | None:
        """The access token, None for an anonymous reader."""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token if scheme.lower() == "bearer" and token else None

    def flag(self, name: str) -> bool:
        """A boolean of the query string; absent means False."""
        return parse_qs(urlsplit(self.target).query).get(name, [""])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class FileSpan:
    """`length` bytes of `source` from `start`."""

    source: Path
    start: int
    length: int


@dataclass(frozen=True)
class HubAnswer:
    """A response; `body` is sent for GET only, its length is told for HEAD as well."""

    status: int
    body: bytes | FileSpan
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return self.body.length if isinstance(self.body, FileSpan) else len(self.body)


def answer(catalog: Catalog, request: HubRequest) -> HubAnswer:
    """Answer `request` from `catalog`; refusals become the error responses that clients understand."""
    path = urlsplit(request.target).path
    try:
        for pattern, handler in _ROUTES:
            if match := re.fullmatch(pattern, path):
                named = {name: unquote(value) for name, value in match.groupdict(default="").items()}
                repository = catalog.repository(named.pop("repo"), request.token)
                return handler(request, repository, **named)
        raise HubRefusal(404, "RepoNotFound", f"this Hub has nothing at {path}")
    except HubRefusal as refusal:
        return _refused(refusal)


def _model_info(request: HubRequest, repository: Repository, revision: str = DEFAULT_BRANCH) -> HubAnswer:
    snapshot = repository.snapshot(revision)
    with_blobs = request.flag("blobs")
    info = {
        "_id": snapshot.commit[:24],
        "id": repository.repo_id,
        "modelId": repository.repo_id,
        "sha": snapshot.commit,
        "private": False,
        "gated": False if repository.readers is None else "manual",
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [_sibling(file, with_blobs) for file in snapshot.files.values()],
    }
    return _json_answer(info, snapshot)


def _tree(request: HubRequest, repository: Repository, revision: str, under: str) -> HubAnswer:
    snapshot = repository.snapshot(revision)
    entries = snapshot.entries(under, recursive=request.flag("recursive"))
    return _json_answer([_tree_entry(entry) for entry in entries], snapshot)


def _refs(_request: HubRequest, repository: Repository) -> HubAnswer:
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
        for name, commit in repository.branches.items()
    ]
    return _json_answer({"branches": branches, "converts": [], "tags": [], "pullRequests": []})


def _resolve(request: HubRequest, repository: Repository, revision: str, path: str) -> HubAnswer:
    repository.check_readable(request.token)
    snapshot = repository.snapshot(revision)
    file = snapshot.file(path)
    headers = _file_headers(file, snapshot)
    match = _BYTE_RANGE.fullmatch(request.headers.get("range", ""))
    if match is None or not any(match.groups()):
        return HubAnswer(200, FileSpan(file.source, 0, file.size), headers)
    start, stop = _span(match["first"], match["last"], file.size)
    if start >= stop:
        return HubAnswer(416, b"", {**headers, "Content-Range": f"bytes */{file.size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
    return HubAnswer(206, FileSpan(file.source, start, stop - start), headers)


_ROUTES: tuple[tuple[str, Callable[..., HubAnswer]], ...] = (
    (rf"/api/models/{_REPO}", _model_info),
    (rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", _model_info),
    (rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<under>.+))?", _tree),
    (rf"/api/models/{_REPO}/refs", _refs),
    (rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve),
)


def _span(first: str, last: str, size: int) -> tuple[int, int]:
    """The half-open span of bytes that `first-last` asks for; `-n` asks for the last n bytes."""
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(int(last) + 1, size) if last else size


def _file_headers(file: ServedFile, snapshot: Snapshot) -> dict[str, str]:
    headers = {
        "Content-Type": "application/octet-stream",
        "ETag": f'"{file.etag}"',
        "X-Repo-Commit": snapshot.commit,
        "Accept-Ranges": "bytes",
    }
    if file.sha256:
        headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    return headers


def _sibling(file: ServedFile, with_blobs: bool) -> dict[str, Any]:
    if not with_blobs:
        return {"rfilename": file.path}
    blob: dict[str, Any] = {"rfilename": file.path, "size": file.size, "blobId": file.oid}
    if file.sha256:
        blob["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return blob


def _tree_entry(entry: ServedFile | str) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"type": "directory", "path": entry, "oid": "", "size": 0}
    row: dict[str, Any] = {"type": "file", "path": entry.path, "oid": entry.oid, "size": entry.size}
    if entry.sha256:
        row["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return row


def _json_answer(content: Any, snapshot: Snapshot | None = None) -> HubAnswer:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    if snapshot is not None:
        headers["X-Repo-Commit"] = snapshot.commit
    return HubAnswer(200, json.dumps(content).encode(), headers)


def _refused(refusal: HubRefusal) -> HubAnswer:
    headers = {
        "Content-Type": "application/json; charset=utf-8",
        "X-Error-Code": refusal.code,
        "X-Error-Message": str(refusal),
    }
    if refusal.commit is not None:
        headers["X-Repo-Commit"] = refusal.commit
    return HubAnswer(refusal.status, json.dumps({"error": str(refusal)}).encode(), headers)
