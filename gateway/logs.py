"""How log lines are written: as text, or as JSON objects, one a line.

No text of users is ever logged. An exception may quote one in its own words, so of those that happen in a
request a line has the class and the places in the code, and not the message.
"""

from __future__ import annotations

import datetime
import logging
import traceback
from typing import Any, Literal

import orjson

from gateway.context import RequestContext, current

LogFormat = Literal["text", "json"]

# What a caller may give with `extra`.
_EXTRA = ("status", "duration_ms")


def configure(level: str, log_format: LogFormat) -> None:
    """Sets up the root logger."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _Formatter(logging.Formatter):
    def formatException(self, ei: Any) -> str:
        if current() is None:
            return super().formatException(ei)
        kind, error, _ = ei
        parts = []
        while error is not None:
            frames = "".join(traceback.format_tb(error.__traceback__))
            parts.append(f"Traceback (most recent call last):\n{frames}{type(error).__qualname__}")
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return "\n\nwhich came of\n\n".join(parts) or str(kind)

    def format(self, record: logging.LogRecord) -> str:
        # Kept by the first formatter for all others, which may write it elsewhere.
        record.exc_text = None
        return super().format(record)


class TextFormatter(_Formatter):
    """2026-01-31 12:00:00,000 WARNING gateway.readiness: bge-m3 does not answer [request abc]."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        context = current()
        text = super().formatMessage(record)
        return text if context is None else f"{text} [request {context.request_id}]"


class JsonFormatter(_Formatter):
    """{"time", "level", "logger", "message"}, in a request also {"request_id", "route", "model"}, with an
    exception {"exception"}, and in an access line {"status", "duration_ms"}.
    """

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (context := current()) is not None:
            line.update(_of_request(context))
        line.update((name, getattr(record, name)) for name in _EXTRA if hasattr(record, name))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def _of_request(context: RequestContext) -> dict[str, Any]:
    known = {"request_id": context.request_id, "route": context.route, "model": context.model}
    if context.traceparent:
        known["trace_id"] = context.traceparent.split("-")[1]
    return {name: value for name, value in known.items() if value}
