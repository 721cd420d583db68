"""Shows a stage's numbers at the server's metrics port.

Each update is a message to the server's process (17 to 110 us on 2.51), so the threads that compute only add
to a tally, and a thread of its own tells the server once a second.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import triton_python_backend_utils as pb_utils

from backends.tally import PASS_TOKENS, Count, Tally

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0
_PREFIX = "triton_embeddings_encoder_"
_DESCRIPTIONS = {
    Count.TURNS: ("turns_total", "Turns: what was computed at once, of whatever requests"),
    Count.PASSES: ("pass_tokens_count", "Forward passes"),
    Count.TOKENS: ("pass_tokens_sum", "Tokens that forward passes computed, without padding"),
    Count.PADDING: ("padding_tokens_total", "Padding that forward passes computed"),
    Count.SHARED: ("shared_prefix_tokens_total", "Tokens not computed, as others of the pass begin alike"),
    Count.OUT_OF_MEMORY: ("out_of_memory_retries_total", "Passes tried again in smaller ones"),
    Count.EXPIRED: ("expired_requests_total", "Requests whose deadline passed before they were computed"),
}


class ServerCounters:
    """Of one stage. A server without metrics gets none (`tritonserver --allow-metrics=false`)."""

    def __init__(self, labels: dict[str, str], tally: Tally) -> None:
        self._tally = tally
        self._labels = labels
        # A metric lives as long as its family: without these the server refuses updates (2.51).
        self._families: list[Any] = []
        self._is_over = threading.Event()
        try:
            self._make()
        except pb_utils.TritonModelException as error:
            logger.info("no metrics: %s", error)
            return
        self._thread = threading.Thread(target=self._report, daemon=True)
        self._thread.start()

    def _make(self) -> None:
        self._counts = {count: self._metric(name, text) for count, (name, text) in _DESCRIPTIONS.items()}
        # The server's own kind of histogram takes one value at a time. This is the same to Prometheus: how
        # many passes were within each bound.
        bounds = {bound: {"le": str(bound)} for bound in PASS_TOKENS} | {0: {"le": "+Inf"}}
        family = self._family("pass_tokens_bucket", "Forward passes of at most so many tokens")
        self._sizes = {bound: family.Metric(labels={**self._labels, **own}) for bound, own in bounds.items()}
        started = self._family(
            "start_time_seconds", "When the process began, in seconds since 1970", pb_utils.MetricFamily.GAUGE
        )
        self._started = started.Metric(labels=self._labels)
        self._started.set(time.time())

    def _family(self, name: str, text: str, kind: Any = None) -> Any:
        kind = pb_utils.MetricFamily.COUNTER if kind is None else kind
        family = pb_utils.MetricFamily(name=_PREFIX + name, description=text, kind=kind)
        self._families.append(family)
        return family

    def _metric(self, name: str, text: str) -> Any:
        return self._family(name, text).Metric(labels=self._labels)

    def stop(self) -> None:
        """Tells what is left."""
        self._is_over.set()
        if self._families:
            self._thread.join(2 * _INTERVAL_S)

    def _report(self) -> None:
        while not self._is_over.wait(_INTERVAL_S):
            self._tell()
        self._tell()

    def _tell(self) -> None:
        counts, sizes = self._tally.take()
        for count, amount in counts.items():
            if amount:
                self._counts[count].increment(amount)
        within = 0
        for bound, metric in self._sizes.items():
            within += sizes[bound]
            if within:
                metric.increment(within)
