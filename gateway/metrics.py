"""Every number that the gateway tells of itself at /metrics, declared in one place.

Labels have few values: routes are templates, models are those that are loaded, and what is neither is one
value. With several workers (GATEWAY_WORKERS) each keeps its numbers in a file of the folder that
PROMETHEUS_MULTIPROC_DIR names, and whichever worker is asked tells of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from gateway.context import Lane, RequestContext

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

NO_MODEL = "none"
"""Of a request that no model was asked for: it was refused before, or is not about one."""
NO_LANE = "none"
"""Of a request that is answered or refused before its size, which says the lane, is known."""
OTHER_ROUTE = "other"
"""Of a path that does not exist, and of pages that are not the API."""

# When each series began is a series of its own otherwise.
disable_created_metrics()
_registry = CollectorRegistry()
ProcessCollector(registry=_registry)

# Most requests take milliseconds on a GPU and up to seconds on a CPU; bulk requests wait for minutes.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 100.0, 300.0)

REQUESTS = Counter(
    "triton_embeddings_requests",
    "HTTP requests that were answered",
    ("route", "model", "status"),
    registry=_registry,
)
REQUEST_DURATION = Histogram(
    "triton_embeddings_request_duration_seconds",
    "From a request's first byte to its answer's last, by the lane that it waited in",
    ("route", "model", "lane"),
    buckets=_SECONDS,
    registry=_registry,
)
PHASE_DURATION = Histogram(
    "triton_embeddings_phase_duration_seconds",
    "What a request's time was spent on",
    ("phase", "model"),
    buckets=_SECONDS,
    registry=_registry,
)
TOKENS = Counter(
    "triton_embeddings_tokens",
    "Tokens of inputs that were answered, special tokens included",
    ("model",),
    registry=_registry,
)
TRUNCATED_INPUTS = Counter(
    "triton_embeddings_truncated_inputs",
    "Inputs that were cut because they were over the limit",
    ("model",),
    registry=_registry,
)
MODEL_UP = Gauge(
    "triton_embeddings_model_up",
    "Whether the model answers: 1 when its last inference or canary went through, else 0",
    ("model",),
    multiprocess_mode="livemin",
    registry=_registry,
)
SERVER_UP = Gauge(
    "triton_embeddings_server_up",
    "Whether the inference server lists its models: 1 or 0",
    multiprocess_mode="livemin",
    registry=_registry,
)
SERVER_MODEL_UP = Gauge(
    "triton_embeddings_server_model_up",
    "Whether one server answers for a model, as pings and requests tell: 1 or 0",
    ("server", "model"),
    multiprocess_mode="livemin",
    registry=_registry,
)
QUEUED_TOKENS = Gauge(
    "triton_embeddings_queued_tokens",
    "Tokens of requests that wait to be sent to the server",
    ("lane", "model"),
    multiprocess_mode="livesum",
    registry=_registry,
)
QUEUED_TOKENS_LIMIT = Gauge(
    "triton_embeddings_queued_tokens_limit",
    "Tokens that may wait before requests are refused",
    ("lane", "model"),
    multiprocess_mode="livesum",
    registry=_registry,
)
QUEUED_REQUESTS = Gauge(
    "triton_embeddings_queued_requests",
    "Requests that wait to be sent to the server",
    ("lane", "model"),
    multiprocess_mode="livesum",
    registry=_registry,
)
IN_FLIGHT_TOKENS = Gauge(
    "triton_embeddings_in_flight_tokens",
    "Tokens that the server has and has not answered",
    ("model",),
    multiprocess_mode="livesum",
    registry=_registry,
)
TOKENS_PER_SECOND = Gauge(
    "triton_embeddings_admission_tokens_per_second",
    "How fast the server answers tokens, as admission reckons; 0 until it has answered some",
    ("model",),
    multiprocess_mode="livesum",
    registry=_registry,
)
REJECTED_REQUESTS = Counter(
    "triton_embeddings_rejected_requests",
    "Requests that were refused because too much waited (busy), or their key had used its tokens (key)",
    ("lane", "model", "reason"),
    registry=_registry,
)
EXPIRED_REQUESTS = Counter(
    "triton_embeddings_expired_requests",
    "Requests whose deadline passed while they waited",
    ("lane", "model"),
    registry=_registry,
)
_HAS_WORKERS = values.ValueClass is not values.MutexValue
_shown_models: set[str] = set()
_shown_servers: set[tuple[str, str]] = set()
_BUSY, _KEY = "busy", "key"
_OF_LANES = (QUEUED_TOKENS, QUEUED_TOKENS_LIMIT, QUEUED_REQUESTS, EXPIRED_REQUESTS)


class LaneLoad(Protocol):
    """One lane of a model, now and since the start."""

    @property
    def queued_tokens(self) -> int: ...
    @property
    def max_queued_tokens(self) -> int: ...
    @property
    def queued_requests(self) -> int: ...
    @property
    def rejected(self) -> int: ...
    @property
    def expired(self) -> int: ...


class Load(Protocol):
    """What admission knows of the work of a model that is under way."""

    @property
    def model(self) -> str: ...
    @property
    def lanes(self) -> Mapping[Lane, LaneLoad]: ...
    @property
    def in_flight_tokens(self) -> int: ...
    @property
    def tokens_per_s(self) -> float | None: ...


def show_load(load: Load, before: Load | None) -> None:
    """Sets the gauges of what is under way, and counts what came to its end since `before`."""
    for lane, one in load.lanes.items():
        last = before.lanes[lane] if before is not None else None
        QUEUED_TOKENS.labels(lane, load.model).set(one.queued_tokens)
        QUEUED_TOKENS_LIMIT.labels(lane, load.model).set(one.max_queued_tokens)
        QUEUED_REQUESTS.labels(lane, load.model).set(one.queued_requests)
        REJECTED_REQUESTS.labels(lane, load.model, _BUSY).inc(one.rejected - (last.rejected if last else 0))
        EXPIRED_REQUESTS.labels(lane, load.model).inc(one.expired - (last.expired if last else 0))
    IN_FLIGHT_TOKENS.labels(load.model).set(load.in_flight_tokens)
    TOKENS_PER_SECOND.labels(load.model).set(load.tokens_per_s or 0.0)


def show_models(models: Mapping[str, str | None], *, is_server_up: bool) -> None:
    """Sets what is known of each model: why it does not answer, or None."""
    SERVER_UP.set(is_server_up)
    for gone in _shown_models - models.keys():
        # Nobody waits for a model that was removed. The files of several workers keep what they once had.
        if _HAS_WORKERS:
            MODEL_UP.labels(gone).set(True)
        else:
            MODEL_UP.remove(gone)
    _shown_models.clear()
    _shown_models.update(models)
    for name, reason in models.items():
        MODEL_UP.labels(name).set(reason is None)
        # A rate needs a first value: what never happened is 0, and not missing.
        for metric in _OF_LANES:
            for lane in Lane:
                metric.labels(lane, name)
        for lane in Lane:
            REJECTED_REQUESTS.labels(lane, name, _BUSY)


def show_servers(answers: Mapping[tuple[str, str], bool]) -> None:
    """Sets, by a server's address and a model's name, whether that server answers for it."""
    for gone in _shown_servers - answers.keys():
        if _HAS_WORKERS:
            SERVER_MODEL_UP.labels(*gone).set(True)
        else:
            SERVER_MODEL_UP.remove(*gone)
    _shown_servers.clear()
    _shown_servers.update(answers)
    for labels, does in answers.items():
        SERVER_MODEL_UP.labels(*labels).set(does)


def count_request(context: RequestContext, status: int, seconds: float) -> None:
    """One answered request, with its phases."""
    route, model = context.route or OTHER_ROUTE, context.model or NO_MODEL
    _requests(route, model, status).inc()
    _request_duration(route, model, context.lane_taken or context.lane or NO_LANE).observe(seconds)
    if context.model:
        for phase, duration in context.phases.items():
            _phase_duration(phase, model).observe(duration)


def count_refusal_of_key(context: RequestContext) -> None:
    """Of a request whose key has used up its tokens; before its body is read it has no model yet."""
    REJECTED_REQUESTS.labels(context.lane or NO_LANE, context.model or NO_MODEL, _KEY).inc()


# Looking a series up by its labels takes as long as adding to it.
_requests = cache(REQUESTS.labels)
_request_duration = cache(REQUEST_DURATION.labels)
_phase_duration = cache(PHASE_DURATION.labels)


def render(multiprocess_folder: Path | None) -> bytes:
    """All of it in Prometheus' text format; with a folder, of all workers."""
    if multiprocess_folder is None:
        return generate_latest(_registry)
    _forget_dead_workers(multiprocess_folder)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(multiprocess_folder))
    return generate_latest(registry)


def _forget_dead_workers(folder: Path) -> None:
    """What a worker counted stays when it dies; what it held does not."""
    for pid in {file.stem.rsplit("_", 1)[1] for file in folder.glob("gauge_live*.db")}:
        if not Path("/proc", pid).exists():
            mark_process_dead(int(pid), str(folder))
