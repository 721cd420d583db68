"""Statuses of the inference server, and the failures of its stages, as the errors that clients see."""

from __future__ import annotations

import logging
import re

import grpc
from tritonclient.utils import InferenceServerException

from backends.contract import SHARED_MEMORY_FULL, ErrorCode, StageFailure
from gateway.errors import (
    GatewayError,
    ModelLost,
    RefusedItem,
    ServerFault,
    TimedOut,
    Unavailable,
)
from gateway.inference_server import DEAD_STUB, has_status, is_not_loaded
from gateway.urgency import time_limit

logger = logging.getLogger(__name__)

_PYTHON_FAULT = re.compile(r"(?s)(?<=message: )\w*(?:Error|Exception)\b.*")


def explain(error: InferenceServerException, subject: str, timeout_s: float) -> GatewayError:
    """A status of the server -> the error that the client sees."""
    message = error.message() or ""
    failure = StageFailure.parse(message)
    if failure is not None and failure.code is ErrorCode.OUT_OF_MEMORY:
        logger.warning("%s: %s", subject, message)
        return Unavailable(f"{subject}: {failure.message}")
    if failure is not None and failure.code is ErrorCode.DEADLINE_EXCEEDED:
        limit = time_limit(timeout_s)
        return TimedOut(f"{subject}: {failure.message}") if limit is None else limit.error(subject)
    if failure is not None and failure.code is not ErrorCode.INTERNAL:
        return RefusedItem(failure.message, item=failure.item, reason=failure.code)
    if SHARED_MEMORY_FULL in message:
        logger.warning("%s: %s", subject, message)
        return _no_shared_memory(subject)
    if failure is None and DEAD_STUB.search(message):
        logger.debug("%s: %s", subject, message)
        return not_answering(subject)
    if has_status(error, grpc.StatusCode.DEADLINE_EXCEEDED):
        return TimedOut(f"{subject} did not answer within {timeout_s:g} s; send fewer or shorter inputs")
    if is_not_loaded(error):
        lost = ModelLost(f"the model {subject} is not loaded at the moment; try again in a while")
        lost.is_unloaded = True
        return lost
    if has_status(error, grpc.StatusCode.UNAVAILABLE):
        logger.debug("%s: %s", subject, message)
        return ModelLost("the inference server cannot be reached at the moment; try again in a while")
    # What a stage's exception says may be a piece of a text.
    logger.error(
        "%s: %s %s",
        subject,
        error.status() or "",
        _PYTHON_FAULT.sub("(the server's log tells more)", message),
    )
    return ServerFault("the model failed on this request; the server's log tells why")


def not_answering(subject: str) -> ModelLost:
    """Of a model whose process died, or stands still."""
    return ModelLost(f"the model {subject} does not answer at the moment; try again in a while")


def _no_shared_memory(subject: str) -> Unavailable:
    return Unavailable(
        f"{subject}: the inference server's /dev/shm has no room for so many inputs at the moment; send "
        "fewer or shorter ones at a time, or try again in a while (the operator can give the container more "
        "of it with --shm-size, or lower --max-batch-tokens)"
    )
