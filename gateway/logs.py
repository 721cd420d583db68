"""How log lines are written: as text, or as JSON objects, one a line.

No text of users is ever logged, unless whoever looks for a fault asks for it (level debug): of an exception
that nobody foresaw a line says where it was raised and of which type it is, and not its own words, which may
quote a request.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import traceback
from types import TracebackType
from typing import Any, Literal

import orjson

from gateway.context import RequestContext, current

LogFormat = Literal["text", "json"]

# What a caller may give with `extra`.
_EXTRA = ("status", "duration_ms")
# Exceptions whose texts name types, numbers and names of the program. Those of others (ValueError, KeyError)
# may have a piece of a request in them.
_PLAIN = (
    ArithmeticError,
    AttributeError,
    ImportError,
    IndexError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    TypeError,
)
_Info = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

logger = logging.getLogger(__name__)


def configure(level: str, log_format: LogFormat) -> None:
    """Sets up the root logger, which uvicorn's lines go to as well."""
    shows_texts = level == "debug"
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter(shows_texts=shows_texts)
        if log_format == "json"
        else TextFormatter(shows_texts=shows_texts)
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # It tells of every connection and request below that.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class _Formatter(logging.Formatter):
    def __init__(self, *, shows_texts: bool = False) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._shows_texts = shows_texts

    def formatException(self, ei: _Info) -> str:
        error = ei[1]
        if self._shows_texts or error is None:
            return super().formatException(ei)
        return "\n".join(_lines(error))

    def format(self, record: logging.LogRecord) -> str:
        # Kept by the first formatter for all others, which may write it elsewhere.
        record.exc_text = None
        return super().format(record)


def _lines(error: BaseException) -> list[str]:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    above = [] if cause is None else [*_lines(cause), "and then:"]
    frames = [line.rstrip("\n") for line in traceback.format_tb(error.__traceback__)]
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    text = str(error) if isinstance(error, _PLAIN) else "(its text is shown with GATEWAY_LOG_LEVEL=debug)"
    return [*above, *frames, f"{kind}: {text}"]


class TextFormatter(_Formatter):
    """2026-01-31 12:00:00,000 WARNING gateway.readiness: bge-m3 does not answer [request abc]."""

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


def log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The event loop's handler of what nobody has caught: asyncio's own writes whole tasks, with the texts of
    their exceptions.
    """
    logger.error("%s", context.get("message", "unexpected error"), exc_info=context.get("exception"))
