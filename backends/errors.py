"""The errors of this side of the server.

BackendError
  +-- RequestError      one request cannot be answered; its neighbours in the batch can
  +-- CheckpointError   a checkpoint cannot be served
  +-- OptionError       an option has a value that cannot be used

`stages/response.py` is the one place that turns them into the server's own errors.
"""

from __future__ import annotations

from backends.contract import ErrorCode, StageFailure


class BackendError(Exception):
    """Base of all errors raised here; its text is written for a person."""


class RequestError(BackendError):
    """What is wrong with one request, and with which of its items."""

    def __init__(self, code: ErrorCode, message: str, item: int | None = None) -> None:
        super().__init__(message)
        self.failure = StageFailure(code, message, item)


class CheckpointError(BackendError):
    """What a checkpoint lacks, or holds that cannot be served."""


class OptionError(BackendError):
    """An option's name, its value, and what it takes."""
