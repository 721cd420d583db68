"""Bodies and statuses of errors as several dialects write them: one style may speak on routes of many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backends.contract import ErrorCode
from gateway.errors import (
    AnswerTooLarge,
    BadRequest,
    BodyTooLarge,
    EmptyInput,
    Forbidden,
    GatewayError,
    HeadersTooLarge,
    RefusedItem,
    ServerFault,
    SlowClient,
    TimedOut,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    UnknownModel,
    WrongTask,
)


@dataclass(frozen=True)
class ErrorStyle:
    """How a dialect tells of errors."""

    render: Callable[[GatewayError], Any]
    """An error -> the JSON content of its response."""
    status: Callable[[GatewayError], int] = lambda error: error.status
    """An error -> the HTTP status, where the dialect has its own."""


def _openai_error(error: GatewayError, field: str = "input") -> dict[str, Any]:
    message, param = error.message, error.param
    if isinstance(error, RefusedItem):
        message, param = error.explain(field), error.blame(field)
    kind = next(name for cls, name in _OPENAI_TYPES if isinstance(error, cls))
    code = error.code or _OPENAI_CODES.get(type(error))
    return {"message": message, "type": kind, "param": param, "code": code}


_OPENAI_TYPES: tuple[tuple[type[GatewayError], str], ...] = (
    (Unauthorized, "authentication_error"),
    (Forbidden, "permission_error"),
    (TooManyRequests, "rate_limit_error"),
    (BadRequest, "invalid_request_error"),
    (GatewayError, "server_error"),
)
_OPENAI_CODES: dict[type[GatewayError], str] = {
    BodyTooLarge: "body_too_large",
    AnswerTooLarge: "answer_too_large",
    UnknownModel: "model_not_found",
}

OPENAI = ErrorStyle(lambda error: {"error": _openai_error(error)})
"""{"error": {"message", "type", "param", "code"}}."""


def _rerank_body(error: GatewayError) -> dict[str, Any]:
    body = _openai_error(error, "documents")
    return {"message": body["message"], "detail": body["message"], "error": body}


_COHERE_ADVICE = {ErrorCode.CONTEXT_LENGTH_EXCEEDED: 'Send "truncate": "END" to have it cut.'}


def _cohere_body(error: GatewayError) -> dict[str, Any]:
    if isinstance(error, RefusedItem):
        return {"message": error.explain("texts", _COHERE_ADVICE)}
    return {"message": error.message}


COHERE = ErrorStyle(_cohere_body)
"""{"message"}."""

RERANK = ErrorStyle(_rerank_body)
"""What clients of Cohere (message), of Jina and Voyage (detail), and of OpenAI's shape (error) read,
in one body.
"""


_RTP_LLM_CODES: tuple[tuple[type[GatewayError], int, str], ...] = (
    (TooManyRequests, 409, "CONCURRENCY_LIMIT_ERROR"),
    (BadRequest, 507, "ERROR_INPUT_FORMAT_ERROR"),
    (Unavailable, 514, "UNKNOWN_ERROR"),
    (TimedOut, 514, "UNKNOWN_ERROR"),
    (ServerFault, 606, "EXECUTION_EXCEPTION"),
)


def _rtp_llm_body(error: GatewayError) -> dict[str, Any]:
    known = (row for row in _RTP_LLM_CODES if isinstance(error, row[0]))
    _, code, name = next(known, (GatewayError, 514, "UNKNOWN_ERROR"))
    message = error.message
    if isinstance(error, RefusedItem):
        message = error.explain("input")
        if error.reason in (ErrorCode.CONTEXT_LENGTH_EXCEEDED, ErrorCode.IMAGES_TOO_LONG):
            code, name = 511, "LONG_PROMPT_ERROR"
    return {"error_code": code, "error_code_str": f"{code}_{name}", "message": message}


RTP_LLM = ErrorStyle(_rtp_llm_body)
"""{"error_code", "error_code_str", "message"}."""


# The first that fits: (error, status, error_type).
_TEI_KINDS: tuple[tuple[type[GatewayError], int, str], ...] = (
    (EmptyInput, 400, "Empty"),
    (WrongTask, 400, "Validation"),
    (UnknownModel, 404, "Validation"),
    (BodyTooLarge, 413, "Validation"),
    (AnswerTooLarge, 413, "Validation"),
    (Unauthorized, 401, "Validation"),
    (Forbidden, 403, "Validation"),
    (TooManyRequests, 429, "Overloaded"),
    (SlowClient, 408, "Validation"),
    (HeadersTooLarge, 431, "Validation"),
    (BadRequest, 422, "Validation"),
    (Unavailable, 503, "Unhealthy"),
    (TimedOut, 504, "Backend"),
    (ServerFault, 424, "Backend"),
)


def _tei_kind(error: GatewayError) -> tuple[int, str]:
    return next((status, kind) for cls, status, kind in _TEI_KINDS if isinstance(error, cls))


def _tei_body(error: GatewayError) -> dict[str, Any]:
    message = error.explain("inputs") if isinstance(error, RefusedItem) else error.message
    return {"error": message, "error_type": _tei_kind(error)[1]}


TEI = ErrorStyle(_tei_body, lambda error: _tei_kind(error)[0])
"""{"error": message, "error_type"}, with text-embeddings-inference's own statuses."""
