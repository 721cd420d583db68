"""The errors of the gateway, and what each dialect makes of them.

GatewayError
  +-- BadRequest           400  the client can mend it
  |     +-- UnknownModel   404
  |     +-- BodyTooLarge   413
  +-- ServerFault          500  a fault on this side; what it was stands in the log only
        +-- Unavailable    503  try again soon
        +-- TimedOut       504

Endpoints, tasks and the inference client raise them; `app.py` answers with the body of the dialect whose
route the request took.
"""

from __future__ import annotations

from typing import ClassVar

from backends.contract import ErrorCode


class GatewayError(Exception):
    """Base of all errors that clients see. Its text is written for the person behind the client."""

    status: ClassVar[int] = 500
    retry_after_s: ClassVar[int | None] = None

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


class BodyTooLarge(BadRequest):
    """The request's body is over the limit."""

    status = 413


class ServerFault(GatewayError):
    """Something failed on this side."""


class Unavailable(ServerFault):
    """The inference server cannot be reached, or the model is not loaded."""

    status = 503
    retry_after_s = 1


class TimedOut(ServerFault):
    """The inference server did not answer in time."""

    status = 504


class RefusedItem(BadRequest):
    """A stage of the pipeline refused an item of the request; `item` is its place in the client's own
    list.
    """

    def __init__(self, message: str, *, item: int | None, reason: ErrorCode) -> None:
        super().__init__(message, code=reason)
        self.item = item
        self.reason = reason
