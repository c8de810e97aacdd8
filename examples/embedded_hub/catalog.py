"""What the embedded Hub serves: folders, read as commits of named repositories. No HTTP here."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

LARGE_FILE_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".model"})
DEFAULT_BRANCH = "main"


class HubRefusal(Exception):
    """A request that the Hub turns down.

    Attributes:
        status: HTTP status code.
        code: the Hub's name for the reason, sent as `X-Error-Code`; clients choose their exception by it.
        commit: the commit the request resolved to, where it got that far. A client that receives one remembers
            that the file does not exist there.
    """

    def __init__(self, status: int, code: str, message: str, *, commit: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.commit = commit


@dataclass(frozen=True)
class ServedFile:
    """One file of a commit.

    Attributes:
        path: where it lies in the repository, with forward slashes.
        source: where it lies on this machine.
        size: bytes.
        oid: git object id; of the LFS pointer when the file is large.
        sha256: of the content, for files a real repository keeps in LFS; None for the others.
    """

    path: str
    source: Path
    size: int
    oid: str
    sha256: str | None

    @classmethod
    def read(cls, source: Path, path: str) -> ServedFile:
        """Hash `source` as the file `path` of a repository."""
        size = source.stat().st_size
        if source.suffix not in LARGE_FILE_SUFFIXES:
            return cls(path, source, size, _git_oid(source.read_bytes()), None)
        sha256 = _sha256(source)
        return cls(path, source, size, _git_oid(_lfs_pointer(sha256, size)), sha256)

    @property
    def etag(self) -> str:
        """What names the content: clients store the file under it."""
        return self.sha256 or self.oid

    @property
    def pointer_size(self) -> int:
        """Bytes of the LFS pointer; 0 for a file that has none."""
        return len(_lfs_pointer(self.sha256, self.size)) if self.sha256 else 0


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit, by path."""

    commit: str
    files: Mapping[str, ServedFile]

    @classmethod
    def of_folder(cls, folder: Path) -> Snapshot:
        """Read every file under `folder`. Equal content gives an equal commit.

        Raises:
            NotADirectoryError: `folder` is not a directory.
        """
        if not folder.is_dir():
            raise NotADirectoryError(f"cannot serve {folder} as a repository: it is not a directory")
        sources = sorted(source for source in folder.rglob("*") if source.is_file())
        paths = [source.relative_to(folder).as_posix() for source in sources]
        files = {path: ServedFile.read(source, path) for source, path in zip(sources, paths, strict=True)}
        listing = "\n".join(f"{file.oid} {path}" for path, file in files.items())
        return cls(hashlib.sha1(listing.encode()).hexdigest(), files)

    def file(self, path: str) -> ServedFile:
        """The file at `path`, or the refusal the Hub gives for a file that does not exist."""
        if path not in self.files:
            raise HubRefusal(404, "EntryNotFound", f"{path} is not in this commit", commit=self.commit)
        return self.files[path]

    def entries(self, under: str = "", *, recursive: bool = False) -> Iterator[ServedFile | str]:
        """Files (`ServedFile`) and directories (their paths) below the directory `under`, "" being the root."""
        prefix = f"{under}/" if under else ""
        inside = [file for path, file in self.files.items() if path.startswith(prefix)]
        if not inside and under:
            raise HubRefusal(404, "EntryNotFound", f"{under} is not a directory of this commit", commit=self.commit)
        parents = {parent.as_posix() for file in inside for parent in PurePosixPath(file.path).parents}
        directories = sorted(path for path in parents - {"."} if path.startswith(prefix))
        yield from (path for path in directories if recursive or "/" not in path[len(prefix) :])
        yield from (file for file in inside if recursive or "/" not in file.path[len(prefix) :])


@dataclass
class Repository:
    """A repository: its branches, every commit ever published, and who may read it.

    Attributes:
        readers: the access tokens that may download files; None where anyone may.
    """

    repo_id: str
    readers: frozenset[str] | None = None
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Snapshot] = field(default_factory=dict)

    def publish(self, folder: Path, branch: str = DEFAULT_BRANCH) -> str:
        """Make the present content of `folder` the head of `branch`; return its commit."""
        snapshot = Snapshot.of_folder(folder)
        self.commits[snapshot.commit] = snapshot
        self.branches[branch] = snapshot.commit
        return snapshot.commit

    def snapshot(self, revision: str) -> Snapshot:
        """The commit that a branch or commit id names."""
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise HubRefusal(404, "RevisionNotFound", f"{self.repo_id} has no revision {revision}")
        return self.commits[commit]

    def check_readable(self, token: str | None) -> None:
        """Refuse, as a gated repository does, a reader who is not on its list."""
        if self.readers is None or token in self.readers:
            return
        if token is None:
            raise HubRefusal(401, "GatedRepo", f"{self.repo_id} is gated: log in with an account that has access")
        raise HubRefusal(403, "GatedRepo", f"{self.repo_id} is gated: this account has not been given access")


class Catalog:
    """Every repository of one Hub, by its id."""

    def __init__(self) -> None:
        self._repositories: dict[str, Repository] = {}

    def add(self, repo_id: str, readers: Collection[str] | None = None) -> Repository:
        """Open the (still empty) repository `repo_id`."""
        repository = Repository(repo_id, None if readers is None else frozenset(readers))
        self._repositories[repo_id] = repository
        return repository

    def repository(self, repo_id: str, token: str | None = None) -> Repository:
        """The repository `repo_id`. Like the real Hub, strangers are not told whether a repository exists."""
        if repo_id not in self._repositories:
            raise HubRefusal(401 if token is None else 404, "RepoNotFound", f"there is no repository {repo_id} here")
        return self._repositories[repo_id]


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _sha256(source: Path) -> str:
    digest = hashlib.sha256()
    with source.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
