"""A Hub on loopback: folders served under repository names, in the protocol that huggingface_hub speaks.

A program that runs with the Hub's environment variables downloads from it as it would from the real one, and the Hub
tells afterwards what was downloaded:

    with EmbeddedHub({"bigscience/T0pp": folder}) as hub:
        subprocess.run([sys.executable, "app.py"], env=hub.environment())
    hub.bytes_served("bigscience/T0pp")     # {"config.json": 701, ...}
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

from .catalog import DEFAULT_BRANCH, Catalog, Repository
from .protocol import FileSpan, HubRequest, answer

LOOPBACK = "127.0.0.1"
_BLOCK_BYTES = 1 << 20

# Each of these would lead a client past `HF_ENDPOINT` and `HF_HOME`: to another cache, another account, or nowhere.
_OVERRIDES = (
    "HF_ASSETS_CACHE",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_MODULES_CACHE",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HF_XET_CACHE",
    "HUGGINGFACE_ASSETS_CACHE",
    "HUGGINGFACE_CO_STAGING",
    "HUGGINGFACE_HUB_CACHE",
    "HUGGING_FACE_HUB_TOKEN",
    "TRANSFORMERS_CACHE",
    "TRANSFORMERS_OFFLINE",
)


@dataclass
class LoggedRequest:
    """One line of the log. `bytes_served` counts body bytes, and grows while a body is being sent."""

    method: str
    path: str
    byte_range: str | None
    status: int
    bytes_served: int = 0


class EmbeddedHub:
    """A Hub that serves local folders on 127.0.0.1, on a port of the system's choice, while its `with` block runs.

    Args:
        repos: repository id -> its folder, or branch -> folder for a repository with several revisions. Folders are
            read when the Hub is made; call `publish` to commit later changes.
        gated: repository id -> the access tokens that may download from it. Other readers get the real Hub's
            refusals: 401 without a token, 403 with one.

    Raises:
        NotADirectoryError: a folder does not exist.
        ValueError: `gated` names a repository that is not served.
    """

    def __init__(
        self,
        repos: Mapping[str, str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]],
        *,
        gated: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        gated = gated or {}
        if unknown := sorted(set(gated) - set(repos)):
            raise ValueError(f"gated repositories that are not served: {', '.join(unknown)}")
        self.catalog = Catalog()
        self._log: list[LoggedRequest] = []
        for repo_id, folders in repos.items():
            repository = self.catalog.add(repo_id, gated.get(repo_id))
            for branch, folder in (folders if isinstance(folders, Mapping) else {DEFAULT_BRANCH: folders}).items():
                repository.publish(Path(folder), branch)

    def __enter__(self) -> EmbeddedHub:
        self._homes = tempfile.TemporaryDirectory(prefix="embedded-hub-")
        self._server = _HubServer(self.catalog, self._log)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="embedded-hub")
        self._thread.start()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._homes.cleanup()

    @property
    def url(self) -> str:
        """What `HF_ENDPOINT`, or a function's `endpoint`, has to be."""
        return f"http://{LOOPBACK}:{self._server.server_port}"

    def publish(self, repo_id: str, folder: str | os.PathLike[str], branch: str = DEFAULT_BRANCH) -> str:
        """Commit the present content of `folder` to a branch of a served repository; return the commit id."""
        return self._repository(repo_id).publish(Path(folder), branch)

    def commit(self, repo_id: str, branch: str = DEFAULT_BRANCH) -> str:
        """The commit id at the head of `branch`."""
        return self._repository(repo_id).branches[branch]

    def environment(self, home: str | os.PathLike[str] | None = None) -> dict[str, str]:
        """Environment variables with which a subprocess sees this Hub, and neither the user's cache nor account.

        Args:
            home: `HF_HOME`, to keep or share a cache; without it a new folder, removed when the Hub closes.
        """
        home = home or tempfile.mkdtemp(prefix="home-", dir=self._homes.name)
        kept = {name: value for name, value in os.environ.items() if name not in _OVERRIDES}
        no_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY"), LOOPBACK, "localhost")))
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": os.fspath(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # Transformers would otherwise ask a public service to convert a repository without safetensors.
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    @property
    def requests(self) -> tuple[LoggedRequest, ...]:
        """Every request so far, oldest first."""
        return tuple(self._log)

    def clear_log(self) -> None:
        """Forget the requests so far."""
        self._log.clear()

    def bytes_served(self, repo_id: str) -> dict[str, int]:
        """Body bytes of `repo_id` sent so far, per file; files of which nothing was sent are absent."""
        served: dict[str, int] = {}
        for request in self.requests:
            repo, found, revision_and_path = urlsplit(request.path).path.lstrip("/").partition("/resolve/")
            if found and unquote(repo) == repo_id and request.status in (200, 206) and request.bytes_served:
                path = unquote(revision_and_path.partition("/")[2])
                served[path] = served.get(path, 0) + request.bytes_served
        return served

    def _repository(self, repo_id: str) -> Repository:
        return self.catalog.repository(repo_id)


class _HubServer(ThreadingHTTPServer):
    """A thread per connection, all of them gone once the server is closed."""

    daemon_threads = False

    def __init__(self, catalog: Catalog, log: list[LoggedRequest]) -> None:
        super().__init__((LOOPBACK, 0), _HubRequestHandler)
        self.catalog = catalog
        self.log = log
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        # A client keeps its connections open: their threads wait for requests that will not come.
        for connection in tuple(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # its thread closed it first
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that hangs up in the middle of a body is its own business; anything else is a fault of this Hub.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _HubRequestHandler(BaseHTTPRequestHandler):
    server: _HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: no 40 ms wait between them

    def do_GET(self) -> None:
        self._respond(with_body=True)

    def do_HEAD(self) -> None:
        self._respond(with_body=False)

    def _respond(self, *, with_body: bool) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = answer(self.server.catalog, HubRequest(self.path, headers))
        entry = LoggedRequest(self.command, self.path, headers.get("range"), reply.status)
        # Logged, and each block counted, before it is sent: a client that has its answer finds it in the log.
        self.server.log.append(entry)
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(reply.length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self._send(reply.body, entry)

    def _send(self, body: bytes | FileSpan, entry: LoggedRequest) -> None:
        for block in [body] if isinstance(body, bytes) else _blocks(body):
            entry.bytes_served += len(block)
            self.wfile.write(block)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr: the log is `EmbeddedHub.requests`."""


def _blocks(span: FileSpan) -> Iterator[bytes]:
    with span.source.open("rb") as stream:
        stream.seek(span.start)
        remaining = span.length
        while remaining:
            block = stream.read(min(_BLOCK_BYTES, remaining))
            if not block:
                raise EOFError(f"{span.source} became {remaining} bytes shorter since it was published")
            remaining -= len(block)
            yield block
