"""The real server and gateway, started the way a person starts them, in the user's own environment."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

COMMAND = ROOT / ".venv" / "bin" / "triton-embeddings"
START_TIMEOUT_S = 400
NO_PINGS = {"GATEWAY_PING_INTERVAL_S": "3600"}
"""For tests that read how often a stage was asked: the gateway's pings count as well."""
_SAMPLE = re.compile(r"(?P<name>\w+)(\{(?P<labels>.*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
# Long enough for the slowest machine: nothing is asserted about times.
_ANSWER_TIMEOUT_S = 240
_LOG_END = 8_000


@dataclass
class Serving:
    """A running `triton-embeddings serve`."""

    process: subprocess.Popen[str]
    output: Path
    url: str
    http: str
    grpc: str

    def get(self, path: str, key: str | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer of the gateway."""
        return self._ask(path, key=key)

    def post(self, body: Any, path: str = "/v1/embeddings", key: str | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer to a JSON body."""
        return self._ask(path, body if isinstance(body, bytes) else json.dumps(body).encode(), key=key)

    def delete(self, path: str, key: str | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        return self._ask(path, method="DELETE", key=key)

    def _ask(
        self, path: str, data: bytes | None = None, method: str | None = None, key: str | None = None
    ) -> tuple[int, Any]:
        headers = {} if data is None else {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_TIMEOUT_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def scrape(self) -> dict[tuple[Any, ...], float]:
        """Of the gateway's metrics: sample name and sorted labels, without the server's address -> value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        # As Prometheus reads it: prometheus-client's own parser puts _total behind every counter's name.
        found: dict[tuple[Any, ...], float] = {}
        for sample in filter(None, (_SAMPLE.fullmatch(line) for line in lines if not line.startswith("#"))):
            labels = sorted(set(_LABEL.findall(sample["labels"] or "")))
            found[sample["name"], *(pair for pair in labels if pair[0] != "server")] = float(sample["value"])
        return found

    def turns(self, model: str) -> float:
        """Of the encoder so far, as it told at most a second ago."""
        return self.scrape().get(("triton_embeddings_encoder_turns_total", ("model", model)), 0)

    def descendants(self) -> dict[int, str]:
        """Process id -> command line of everything that this command has started."""
        parents, commands = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                commands[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return {pid: commands[pid] for pid in found - {self.process.pid}}

    def server_log(self) -> str:
        """What tritonserver and the stages have written so far."""
        lines = self.output.read_text().splitlines()
        (file,) = [line.removeprefix("its log: ") for line in lines if line.startswith("its log: ")]
        return Path(file).read_text(errors="replace")

    def everything_said(self) -> str:
        """The output, the end of the server's log, and what still runs."""
        said = self.output.read_text()
        if "its log: " in said:
            said += "\n" + self.server_log()[-_LOG_END:]
        running = "\n".join(f"{pid} {command}" for pid, command in self.descendants().items())
        return f"{said}\nrunning:\n{running}"

    def stop(self, timeout_s: float = 60) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on. Each is given once: it may be free because its server is started again.

    They are below those that the system gives to connections, and others in each process of xdist.
    """
    return [next(_ports) for _ in range(count)]


def _free_ports() -> Iterator[int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw9").removeprefix("gw"))
    first = 20000 + 1000 * (worker % 10)
    begin = os.getpid() % 1000
    for i in itertools.count():
        port = first + (begin + i) % 1000
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        yield port


_ports = _free_ports()


def wait_until(
    condition: Any, what: str, timeout_s: float = START_TIMEOUT_S, also: Callable[[], str] = str
) -> Any:
    """The first true value of the condition. Where it does not come, `also` says what else is known."""
    deadline = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain for {what}\n{also()}"
        time.sleep(0.05)


@contextlib.contextmanager
def serve(
    output: Path, *arguments: Any, command: Any = (COMMAND, "serve"), **environment: str
) -> Iterator[Serving]:
    """Starts the command, waits until it says that it is ready, and stops it afterwards."""
    port, http, grpc, metrics = free_ports(4)
    ports = ["--port", port, "--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    with output.open("w") as stream:
        process = subprocess.Popen(
            [str(part) for part in (*command, *arguments, *ports)],
            stdout=stream,
            stderr=stream,
            text=True,
            cwd="/",
            env={**os.environ, **environment},
        )
    serving = Serving(process, output, f"http://127.0.0.1:{port}", f"127.0.0.1:{http}", f"127.0.0.1:{grpc}")
    try:
        wait_until(
            # The last line of what it says when it is ready.
            lambda: "\nCtrl-C stops everything" in output.read_text() or process.poll() is not None,
            "the line that says how to stop",
            also=serving.everything_said,
        )
        assert process.poll() is None, f"it ended with {process.returncode}: {serving.everything_said()}"
        yield serving
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def gateway(*servers: str) -> Iterator[str]:
    """A gateway alone that asks these servers (their gRPC addresses), when it is ready; its URL."""
    (port,) = free_ports(1)
    environment = {**os.environ, "GATEWAY_PORT": str(port), "GATEWAY_SERVER": ",".join(servers)}
    process = subprocess.Popen([sys.executable, "-m", "gateway"], env=environment, cwd="/")
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready") as answer:
            return bool(answer.status == 200)
        return False

    try:
        wait_until(is_ready, "the gateway")
        yield url
    finally:
        process.terminate()
        assert process.wait(60) == 0
