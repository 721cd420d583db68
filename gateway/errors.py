"""The errors of the gateway, and what each dialect makes of them.

GatewayError
  +-- BadRequest           400  the client can mend it
  |     +-- UnknownModel   404
  |     +-- WrongTask      400
  |     +-- EmptyInput     400
  |     +-- BodyTooLarge   413
  |     +-- AnswerTooLarge 413
  |     +-- RefusedItem    400
  |     +-- Unauthorized   401
  |     +-- Forbidden      403
  |     +-- TooManyRequests 429 try again later
  |     +-- SlowClient     408
  |     +-- HeadersTooLarge 431
  +-- ServerFault          500  a fault on this side; what it was stands in the log only
        +-- Unavailable    503  try again soon
        |     +-- ModelLost 503 its process died, or it is being loaded anew
        +-- TimedOut       504

Endpoints, tasks and the inference client raise them; `app.py` answers with the body of the dialect whose
route the request took.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import ClassVar

from backends.contract import ErrorCode

_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def root_of(field: str) -> str:
    """The field of the body that a part of it is in: input of input[2].image."""
    return field.split("[")[0].split(".")[0]


def shorten(value: object, most: int = 60) -> str:
    """A value as messages show it."""
    # Of a text of megabytes, or of lists in lists, no more is written out than is shown.
    text = repr(value[: most + 1]) if isinstance(value, str) else _REPR.repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


class GatewayError(Exception):
    """Base of all errors that clients see. Its text is written for the person behind the client."""

    status: ClassVar[int] = 500
    retry_after_s: float | None = None
    """When it may be worth trying again; None where it is not."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The request's field that is at fault."""
        self.code = code
        """A word for programs, such as context_length_exceeded."""


class BadRequest(GatewayError):
    """The request cannot be answered as it is."""

    status = 400


class UnknownModel(BadRequest):
    """No such model, or none that serves the task."""

    status = 404


class WrongTask(BadRequest):
    """A model that has no head for what is asked of it."""


class EmptyInput(BadRequest):
    """A request without any text."""


class AnswerTooLarge(BadRequest):
    """More numbers than one answer may hold."""

    status = 413


class BodyTooLarge(BadRequest):
    """The request's body is over the limit."""

    status = 413


class Unauthorized(BadRequest):
    """No key, or one that is not known."""

    status = 401


class Forbidden(BadRequest):
    """A key that may not do this."""

    status = 403


class TooManyRequests(BadRequest):
    """More than is taken in at the moment, of everybody or of this key."""

    status = 429

    def __init__(self, message: str, *, retry_after_s: float, code: str = "rate_limit_exceeded") -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class SlowClient(BadRequest):
    """A body that did not come in time."""

    status = 408


class HeadersTooLarge(BadRequest):
    """More in front of a request's body than is taken."""

    status = 431


class ServerFault(GatewayError):
    """Something failed on this side."""


class Unavailable(ServerFault):
    """The inference server cannot be reached, or the model is not loaded."""

    status = 503
    retry_after_s = 1.0


class ModelLost(Unavailable):
    """What computed the request is gone: a process died, a model is being loaded anew, or the server cannot
    be reached. The request itself did no harm, and may be sent again.
    """

    is_unloaded = False
    """Whether the server said that it has no such entry: it may have another in its place."""


class TimedOut(ServerFault):
    """The inference server did not answer in time."""

    status = 504


class RefusedItem(BadRequest):
    """A stage of the pipeline refused an item of the request."""

    def __init__(
        self, message: str, *, item: int | None, reason: ErrorCode, field: str | None = None
    ) -> None:
        super().__init__(message, code=reason)
        self.item = item
        """Its place in the client's own list."""
        self.reason = reason
        self.field = field
        """The client's list, where a request has several."""

    def explain(self, field: str, other_advice: Mapping[ErrorCode, str] | None = None) -> str:
        """The message with the item's place in the list `field`, and with what a client can do about it; a
        dialect may have advice of its own.
        """
        where = f"{self.field or field}[{self.item}]: " if self.item is not None else ""
        # Who sends ids to have them read knows what they are.
        known = {**ADVICE, **(other_advice or {})}
        advice = known.get(self.reason) if self.field != "ids" else None
        return f"{where}{self.message}" + (f". {advice}" if advice else "")

    def blame(self, field: str) -> str:
        """The request's field that is at fault, where its texts are in `field`."""
        return _FIELDS.get(self.reason, self.field or field)


# What a client of these dialects can do about a refused item, where the stage's own words cannot know it.
ADVICE = {
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: 'Send "truncate": true to have it cut.',
    ErrorCode.INVALID_TOKEN_ID: (
        "LangChain's OpenAIEmbeddings sends ids of OpenAI's own tokenizer unless it is made with "
        "check_embedding_ctx_length=False."
    ),
}
_FIELDS = {
    ErrorCode.UNKNOWN_PROMPT: "prompt_name",
    ErrorCode.INVALID_PROMPT: "prompt",
    ErrorCode.INVALID_INSTRUCTION: "instruction",
    ErrorCode.INVALID_DIMENSIONS: "dimensions",
    ErrorCode.INVALID_TOP_K: "top_k",
}
