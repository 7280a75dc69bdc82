"""A Hugging Face Hub on loopback: the real client pushes models to it and loads them again, with no network.

It keeps models only. It has no xet, pull requests, tags, copies, pages of long lists, resumed downloads, or redirects to
other hosts; it reads neither `.gitignore` nor the metadata of a card. What it cannot answer gets status 501, and a
message that says so.
"""

from __future__ import annotations

import re
import runpy
import secrets
import tempfile
import threading
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.hub_protocol import Answer, Answers, Request, error
from tests.hub_repositories import Refusal, Repository


@dataclass
class Fault:
    """What happens to the next `times` requests: an error status, or a connection that closes early."""

    method: str
    pattern: str
    times: int
    status: int | None = None
    share: float | None = None


class Hub:
    """Answers the Hub's client while its `with` block lasts.

    Attributes:
        url: its address, for HF_ENDPOINT.
        token: the one token it takes, that of the one user, "user".
        requests: every request, oldest first.
    """

    def __enter__(self) -> Hub:
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._home = tempfile.TemporaryDirectory(prefix="hub-")
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.token = f"hf_{secrets.token_hex(17)}"
        self._answers = Answers(self.url, self.token)
        # The server looks this often whether it is to stop, in seconds.
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._home.cleanup()

    def environment(self) -> dict[str, str]:
        """Settings that point a new process here, whatever it inherits: `env={**os.environ, **hub.environment()}`."""
        home = self._home.name
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": home,
            "HF_HUB_CACHE": f"{home}/hub",
            "HF_TOKEN_PATH": f"{home}/token",
            # Where hf_xet is installed, the client takes it for every upload, whatever the server offers.
            "HF_HUB_DISABLE_XET": "1",
            # Or else the client asks for more than the test does, which `requests` is to show.
            "HF_HUB_DISABLE_TELEMETRY": "1",
            # Or else a model without safetensors makes transformers ask for a conversion, in the background.
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HUGGINGFACE_CO_STAGING": "0",
            "no_proxy": "127.0.0.1",
        }

    def patch(self, monkeypatch) -> None:
        """Point this process and its children here, until pytest's `monkeypatch` is undone."""
        point_to(self.environment(), monkeypatch)

    def fail(self, method: str, pattern: str, status: int = 500, times: int = 1) -> None:
        """Answer the next `times` requests with an error status, and do nothing of what they ask for.

        Args:
            method: of the requests, in capitals.
            pattern: regular expression that is searched for in their paths.
            status: of the answer.
            times: how many requests, in all.
        """
        self._faults.append(Fault(method, pattern, times, status=status))

    def cut(self, method: str, pattern: str, share: float | None = None, times: int = 1) -> None:
        """Close the connection of the next `times` requests early.

        Args:
            method: of the requests, in capitals.
            pattern: regular expression that is searched for in their paths.
            share: do what they ask for, and send this share of the body of the answer, in [0, 1); None: do nothing, and
                send nothing.
            times: how many requests, in all.
        """
        if share is not None and (method == "HEAD" or not 0 <= share < 1):
            raise ValueError(
                f"expected a share in [0, 1) and an answer with a body, got {share} for {method}; or None"
            )
        self._faults.append(Fault(method, pattern, times, share=share))

    def seen(self, method: str, pattern: str) -> list[Request]:
        """The requests of this method whose path matches the regular expression, oldest first."""
        return [asked for asked in self.requests if asked.method == method and re.search(pattern, asked.path)]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a revision, with the `.gitattributes` that the Hub puts into every repository."""
        return {path: file.data for path, file in self._repository(repo_id).find(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[str]:
        """The titles of the commits, oldest first: "initial commit", made by the Hub, is one of them."""
        return [commit.title for commit in reversed(self._repository(repo_id).find(revision).history())]

    def _repository(self, repo_id: str) -> Repository:
        if repo_id not in self._answers.repositories:
            raise ValueError(f"expected one of {sorted(self._answers.repositories)}, got {repo_id!r}")
        return self._answers.repositories[repo_id]

    def answer(self, request: Request, address: str) -> Answer | None:
        """Record a request, and give its answer, or None to close the connection without one."""
        with self._lock:
            self.requests.append(request)
            matching = (f for f in self._faults if f.method == request.method and re.search(f.pattern, request.path))
            fault = next((fault for fault in matching if fault.times), None)
            if fault is not None:
                fault.times -= 1
            if fault is None:
                answer = self._answers.to(request, address)
            elif fault.status is not None:
                answer = error(Refusal(fault.status, "The test wants this request to fail"))
            elif fault.share is not None:
                answer = replace(self._answers.to(request, address), share=fault.share)
            else:
                return None
            request.status = answer.status
            return answer


class _Server(ThreadingHTTPServer):
    hub: Hub
    # The client downloads in parallel, on a connection per request; one that finds no place is tried again after 1 s.
    request_queue_size = 64


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0, one request per connection: none stays open when the hub goes."""

    server: _Server

    def answer(self) -> None:
        assert "Transfer-Encoding" not in self.headers, "the client is expected to say how long its body is"
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        agent = self.headers.get("User-Agent", "")
        request = Request(self.command, unquote(url.path), dict(parse_qsl(url.query)), token, agent, body)
        answer = self.server.hub.answer(request, url.path)
        if answer is None:
            return
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: int(len(answer.body) * answer.share)])

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *arguments: object) -> None:
        """Print nothing: `Hub.requests` has it all."""


def point_to(environment: dict[str, str], monkeypatch) -> None:
    """Point this process to a hub by its `environment`.

    huggingface_hub reads its environment once, into its `constants`, where its modules look it up at each call. What
    copies of it matter are those of two instances of HfApi: its own, and that of transformers.
    """
    from huggingface_hub import close_session, constants, hf_api
    from transformers.utils import hub as transformers_hub

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, value in runpy.run_path(constants.__file__).items():
        if name.isupper():
            monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", environment["HF_ENDPOINT"])
    monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)  # from transformers 5.10 on
    # A session keeps the proxies that were set when it was opened.
    close_session()


def without_waiting(monkeypatch) -> list[float]:
    """Let the client's pauses between attempts pass at once, in this process; returns their seconds, as they come."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    pauses: list[float] = []
    for module in (file_download, _http):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=pauses.append))
    return pauses
