"""How log lines look: an exception that nobody foresaw is shown without what somebody has sent."""

from __future__ import annotations

import asyncio
import logging
import traceback
from types import TracebackType
from typing import Any

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


class Formatter(logging.Formatter):
    """Says of an exception where it was raised and of which type it is; its text only with `shows_texts`,
    which whoever looks for a fault may ask for.
    """

    def __init__(self, *, shows_texts: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._shows_texts = shows_texts

    def formatException(self, ei: _Info) -> str:
        error = ei[1]
        if self._shows_texts or error is None:
            return super().formatException(ei)
        return "\n".join(_lines(error))


def _lines(error: BaseException) -> list[str]:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    above = [] if cause is None else [*_lines(cause), "and then:"]
    frames = [line.rstrip("\n") for line in traceback.format_tb(error.__traceback__)]
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    text = str(error) if isinstance(error, _PLAIN) else "(its text is shown with GATEWAY_LOG_LEVEL=debug)"
    return [*above, *frames, f"{kind}: {text}"]


def configure(level: str) -> None:
    """Sets up the root logger, which uvicorn's lines go to as well."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(shows_texts=level == "debug"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # It tells of every connection and request below that.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The event loop's handler of what nobody has caught: asyncio's own writes whole tasks, with the texts of
    their exceptions.
    """
    logger.error("%s", context.get("message", "unexpected error"), exc_info=context.get("exception"))
