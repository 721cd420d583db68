"""Starts the server and the gateway, waits until a real inference has answered, starts again what dies after
that, and stops both in order.
"""

from __future__ import annotations

import json
import os
import secrets
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gateway.access import Access, is_loopback
from gateway.logs import configure
from triton_embeddings.addresses import LOOPBACK, Addresses
from triton_embeddings.dead_stages import DeadStages
from triton_embeddings.errors import CommandError
from triton_embeddings.heartbeat import Heartbeat
from triton_embeddings.preflight import check_packages, check_paths, check_strangers, read_gateway_settings
from triton_embeddings.process import Child, Stop
from triton_embeddings.server_binary import find_server, state_directory
from triton_embeddings.server_log import explain_exit, unloaded
from triton_embeddings.serving_note import noted
from triton_embeddings.shared_memory import SHARED_MEMORY, warn_of_small
from triton_embeddings.supervisor import Supervised

_POLL_INTERVAL_S = 0.1
# The gateway is drained by then. Server 2.51 always waits this long when a process of a model died.
_SERVER_EXIT_TIMEOUT_S = 10
# A model of several billion parameters takes minutes to read from a slow disk.
_START_TIMEOUT_S = 1800
# How often a person is told what a long start waits for.
_PATIENCE_S = 30.0
# A model that is loaded but fails every request will not mend itself.
_FAILURE_PATIENCE_S = 10
# Where a first request to a model goes, by what the model serves.
_ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "embed": ("/v1/embeddings", {"input": "Hello, world"}),
    "sparse": ("/v1/embeddings/sparse", {"input": "Hello, world"}),
    "colbert": ("/v1/embeddings/colbert", {"input": "Hello, world"}),
    "score": ("/v1/rerank", {"query": "coffee", "documents": ["Starbuck", "Peets Coffee"]}),
    "classify": ("/v1/classify", {"input": "Hello, world"}),
    "tokens": ("/embed_all", {"inputs": "Hello, world"}),
}
# For the gateway that this command has started itself: its certificate names where clients find it, which is
# seldom this machine's own address.
_TLS = ssl.create_default_context()
_TLS.check_hostname = False
_TLS.verify_mode = ssl.CERT_NONE


def launch(
    repository: Path, addresses: Addresses, console: Console, stop: Stop, flags: Mapping[str, str]
) -> None:
    """Serves until it is told to stop. Raises CommandError when something does not start, or dies again and
    again.

    `flags` are settings of the gateway that stand on the command line, by the names that they have in
    `gateway/settings.py`.
    """
    check_packages()
    check_paths(repository, state_directory())
    settings = read_gateway_settings(flags)
    configure(_log_level(), settings.log_format)
    access = check_strangers(settings)
    if (warning := warn_of_small(repository)) is not None:
        console.print(f"warning: {warning}", soft_wrap=True, highlight=False)
    server = find_server()
    # Once more, for a download may lie between the first look and this one.
    addresses = replace(addresses.claim(), scheme="https" if settings.tls_cert_file else "http")
    starter_key = secrets.token_urlsafe(32)
    state = state_directory()
    log = state / "log" / f"server-{addresses.grpc_port}.log"
    log.parent.mkdir(exist_ok=True)
    # Containers may share /dev/shm and have the same process ids.
    prefix = f"triton_embeddings_{os.getpid()}_{secrets.token_hex(4)}_"
    with ExitStack() as stack:
        stack.callback(_clear_shared_memory, prefix)
        stack.enter_context(noted(addresses.grpc_port, repository))
        output = stack.enter_context(log.open("wb"))
        command: list[str | Path] = [
            server.path,
            *server.arguments,
            *_server_arguments(repository, addresses, prefix),
            *_trace_arguments(settings.traces_url),
        ]
        heartbeat = Heartbeat(LOOPBACK, addresses.http_port)
        stack.callback(heartbeat.stop)
        # Not in the checkout: the Python backend puts the working directory before the installed packages.
        triton = Supervised(
            lambda: Child("tritonserver", command, server.environment, output, folder=state),
            stop,
            lambda child: _explain(child, log),
            lambda: _clear_shared_memory(prefix),
            heartbeat,
            DeadStages(prefix).reason_for_another_server,
        )
        stack.callback(triton.stop, _SERVER_EXIT_TIMEOUT_S + 5)
        gateway_command = [sys.executable, "-m", "gateway"]
        environment = gateway_environment(addresses, flags, starter_key)
        gateway = Supervised(
            lambda: Child("gateway", gateway_command, environment, folder=state),
            stop,
            lambda child: _explain(child, log),
        )
        # Entered last, so left first: the gateway finishes its requests while the server still answers them.
        stack.callback(gateway.stop, settings.drain_timeout_s + 5)
        started = time.monotonic()
        with console.status("loading the models") if console.is_terminal else nullcontext():
            is_ready = _wait_until_ready(addresses, (triton, gateway), log, stop, console)
        if is_ready:
            console.print(f"loaded in {time.monotonic() - started:.1f} s")
            _introduce(console, addresses, log, access, starter_key)
            while not stop.wait(_POLL_INTERVAL_S):
                triton.look()
                gateway.look()
        console.print(
            "stopping: the gateway finishes its requests, then the server ends (Ctrl-C again: at once)",
            soft_wrap=True,
        )
    console.print("stopped")


def _server_arguments(repository: Path, addresses: Addresses, shared_memory_prefix: str) -> list[str]:
    return [
        f"--model-repository={repository.resolve()}",
        # A model whose process died can only be brought back by unloading and loading it, which needs this
        # mode.
        "--model-control-mode=explicit",
        "--load-model=*",
        f"--http-address={LOOPBACK}",
        f"--http-port={addresses.http_port}",
        f"--grpc-address={LOOPBACK}",
        f"--grpc-port={addresses.grpc_port}",
        f"--metrics-address={LOOPBACK}",
        f"--metrics-port={addresses.metrics_port}",
        # Without it every process of a stage is started twice, at first to ask it for its configuration,
        # which ours have whole: half of the time of a start, and of a repair.
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={_SERVER_EXIT_TIMEOUT_S}",
        f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix}",
    ]


def _trace_arguments(url: str) -> list[str]:
    """The server traces what the gateway traces: with rate 0, only requests that come with a trace."""
    if not url:
        return []
    settings = (
        "mode=opentelemetry",
        "rate=0",
        "level=TIMESTAMPS",
        f"opentelemetry,url={url}",
        "opentelemetry,resource=service.name=triton-embeddings-server",
    )
    return [f"--trace-config={setting}" for setting in settings]


def gateway_environment(
    addresses: Addresses, flags: Mapping[str, str], starter_key: str = ""
) -> dict[str, str]:
    """What is set here already stays, where no flag says otherwise."""
    return {
        **os.environ,
        **{f"GATEWAY_{name.upper()}": value for name, value in flags.items()},
        "GATEWAY_HOST": addresses.host,
        "GATEWAY_PORT": str(addresses.port),
        **({"GATEWAY_STARTER_KEY": starter_key} if starter_key else {}),
        "GATEWAY_SERVER": f"{LOOPBACK}:{addresses.grpc_port}",
        "GATEWAY_SERVER_METRICS": f"{LOOPBACK}:{addresses.metrics_port}",
        # A second gateway may take over.
        "GATEWAY_REUSE_PORT": "true",
        "GATEWAY_LOG_LEVEL": _log_level(),
    }


def _log_level() -> str:
    """Whoever starts all of it wants to see what it says itself, not every step of it."""
    return os.environ.get("GATEWAY_LOG_LEVEL", "warning")


def _wait_until_ready(
    addresses: Addresses, processes: Sequence[Supervised], log: Path, stop: Stop, console: Console
) -> bool:
    """True when every model has answered, False when it was told to stop before that. Says now and then what
    it waits for.

    Raises CommandError when a process ends, or when a model that is loaded keeps failing.
    """
    started = time.monotonic()
    deadline, tell_at = started + _START_TIMEOUT_S, started + _PATIENCE_S
    failing_since: dict[str, float] = {}
    while time.monotonic() < deadline:
        for process in processes:
            process.look_at_start()
        status, body = _get(addresses, "/ready")
        if status == 200:
            return True
        failures = {name: m["reason"] for name, m in body.get("models", {}).items() if m.get("has_failed")}
        failing_since = {name: failing_since.get(name, time.monotonic()) for name in failures}
        for name, since in failing_since.items():
            if time.monotonic() - since > _FAILURE_PATIENCE_S:
                raise CommandError(
                    f"the model {name} is loaded but fails: {failures[name]} (the server's log: {log})"
                )
        if time.monotonic() >= tell_at:
            tell_at += _PATIENCE_S
            waited = f"after {time.monotonic() - started:.0f} s"
            console.print(f"{waited}: {describe_start(body, log)}", soft_wrap=True, highlight=False)
        if stop.wait(_POLL_INTERVAL_S):
            return False
    raise CommandError(f"the models did not answer within {_START_TIMEOUT_S} s; the server's log is {log}")


def describe_start(ready: Mapping[str, Any], log: Path) -> str:
    """What a start waits for, given what the gateway's /ready said, if it did."""
    if entries := unloaded(log):
        return f"still loading {', '.join(entries)} (the server's log: {log})"
    models = {name: model["reason"] for name, model in ready.get("models", {}).items() if model["reason"]}
    if models:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in models.items())
        return f"the models are loaded, and have not answered yet ({reasons})"
    # An error of the gateway has no such field.
    reason = ready.get("reason") or "the gateway does not answer yet"
    return f"{reason} (the server's log: {log})"


def _explain(child: Child, log: Path) -> str:
    assert child.exit_code is not None
    return explain_exit(child.name, child.exit_code, log)


def _get(addresses: Addresses, path: str, key: str = "") -> tuple[int, dict[str, Any]]:
    """Status and JSON of the gateway's answer; 0 when there is none."""
    host = LOOPBACK if addresses.host == "0.0.0.0" else "[::1]" if addresses.host == "::" else addresses.host
    url = f"{addresses.scheme}://{host}:{addresses.port}{path}"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10, context=_TLS) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
    except (OSError, ValueError):
        return 0, {}


def _introduce(console: Console, addresses: Addresses, log: Path, access: Access, starter_key: str) -> None:
    models = _get(addresses, "/v1/models", starter_key)[1].get("data", [])
    table = Table("model", "tasks", "dimensions", "max tokens", box=None, padding=(0, 3, 0, 0))
    for model in models:
        table.add_row(
            model["id"], ", ".join(model["tasks"]), str(model["dimensions"] or ""), str(model["max_length"])
        )
    console.print(f"\n[bold green]ready[/] at {addresses.url}   (the API: {addresses.url}/docs)\n")
    console.print(table)
    first = models[0] if models else {"id": "MODEL", "tasks": ["embed"]}
    route, body = next((r for task, r in _ROUTES.items() if task in first["tasks"]), _ROUTES["embed"])
    request = json.dumps({"model": first["id"], **body})
    console.print("\ntry it:\n", highlight=False)
    key = " -H 'Authorization: Bearer KEY'" if access.asks_for_keys else ""
    console.print(
        f"  curl {addresses.url}{route}{key} -H 'Content-Type: application/json' -d '{request}'\n",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    console.print(
        f"tritonserver: gRPC {LOOPBACK}:{addresses.grpc_port}, HTTP {LOOPBACK}:{addresses.http_port}, "
        f"metrics http://{LOOPBACK}:{addresses.metrics_port}/metrics",
        soft_wrap=True,
    )
    console.print(f"its log: {log}", soft_wrap=True)
    console.print(describe_access(addresses, access), soft_wrap=True)
    console.print("Ctrl-C stops everything")


def describe_access(addresses: Addresses, access: Access) -> str:
    """Who may use what is served, in a sentence for the operator."""
    reach = "this machine alone" if is_loopback(addresses.host) else "whoever reaches this machine"
    where = f"listening on {addresses.host}"
    if not access.asks_for_keys:
        return f"{where}: {reach} can use it; no API key is asked for (GATEWAY_API_KEY gives it one)"
    plain = (
        ""
        if addresses.scheme == "https" or is_loopback(addresses.host)
        else ("; keys travel in plain, as without GATEWAY_TLS_CERT_FILE everything does")
    )
    return f"{where}: {reach} can use it, with an API key{plain}"


def _clear_shared_memory(prefix: str) -> None:
    """The server leaves its regions behind when it is killed."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        # Another user's file or folder is none of the server's, whatever its name.
        with suppress(OSError):
            region.unlink(missing_ok=True)
