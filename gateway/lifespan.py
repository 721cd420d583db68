"""What the gateway has while it serves: made once its event loop runs, closed when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI

from gateway import gauges
from gateway.catalog import Catalog
from gateway.connection import LIMITS, ConnectionLimits
from gateway.drain import Drain
from gateway.endpoints.dialect import Services
from gateway.images import ImageLoader
from gateway.inference import GrpcInference, Inference
from gateway.lengths import BoundedInference
from gateway.logs import log_loop_error
from gateway.observed import Observed
from gateway.readiness import Readiness
from gateway.scoring import Scorer
from gateway.settings import Settings
from gateway.stage_watch import StageWatch
from gateway.vocabulary import Vocabulary

_GC_THRESHOLD = 100_000


@contextlib.asynccontextmanager
async def serving(
    settings: Settings,
    drain: Drain,
    inference: Inference | None,
    send_traces: Callable[[], None] | None,
    app: FastAPI,
) -> AsyncIterator[dict[str, Any]]:
    """The lifespan of an application, to which it gives its services. At the end `send_traces` is called in a
    thread.
    """
    asyncio.get_running_loop().set_exception_handler(log_loop_error)
    # Made here: the gRPC channel belongs to the event loop that runs now.
    server = inference or GrpcInference(
        settings.servers,
        settings.request_timeout_s,
        settings.max_answer_bytes,
        max_answer_bytes_total=settings.max_answer_bytes_total,
        limits=settings.admission_limits,
        repair_wait_s=settings.repair_wait_s,
    )
    own = Observed(server)
    bounded = BoundedInference(own, settings.max_text_bytes, settings.max_prompt_bytes)
    catalog = Catalog(own)
    grpc = server if isinstance(server, GrpcInference) else None
    stages = _watch_stages(grpc, catalog, settings) if grpc is not None else None
    readiness = Readiness(
        own,
        catalog,
        settings.canary_interval_s,
        settings.patience_s,
        stages.fault if stages else lambda pipeline: None,
        drain,
    )
    # One thread: a request with much to compare must not take the processor from all others.
    calculator = ThreadPoolExecutor(1, "calculator")
    scorer = Scorer(bounded, catalog, calculator, settings.max_products)
    images = ImageLoader(settings)
    app.state.services = Services(
        settings, bounded, catalog, readiness, Vocabulary(own), scorer, calculator, images
    )
    watches = [
        asyncio.create_task(readiness.watch()),
        asyncio.create_task(gauges.watch(readiness, catalog, grpc)),
    ]
    if stages is not None:
        watches.append(asyncio.create_task(stages.run()))
    # What lives by now lives for ever: without it, collections of old objects double the 99th percentile.
    # And what a request leaves behind has no cycles: a collection is seldom worth its while.
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, *gc.get_threshold()[1:])
    # uvicorn's part of the end, http_server.py, finds it there.
    yield {LIMITS: ConnectionLimits.of(settings), "drain": drain}
    for watch in watches:
        watch.cancel()
    await asyncio.gather(*watches, return_exceptions=True)
    calculator.shutdown(wait=False, cancel_futures=True)
    await images.close()
    await own.close()
    if send_traces is not None:
        await asyncio.to_thread(send_traces)


def _watch_stages(inference: GrpcInference, catalog: Catalog, settings: Settings) -> StageWatch:
    return StageWatch(
        inference.servers,
        catalog,
        inference.availability,
        interval_s=settings.ping_interval_s,
        hang_timeout_s=settings.hang_timeout_s,
        patience_s=settings.patience_s,
    )
