"""How a stage's log lines look: an exception that nobody foresaw is shown without what somebody has sent."""

from __future__ import annotations

import logging
import traceback
from types import TracebackType

# What torch says (shapes, memory), and exceptions whose texts name types and names of the program. Those of
# others (ValueError, KeyError) may have a piece of a text in them.
_PLAIN = (
    ArithmeticError,
    AttributeError,
    ImportError,
    IndexError,
    MemoryError,
    RuntimeError,
    TypeError,
)
_Info = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class Formatter(logging.Formatter):
    """Says of an exception where it was raised and of which type it is."""

    def formatException(self, ei: _Info) -> str:
        return "" if ei[1] is None else "\n".join(_lines(ei[1]))


def _lines(error: BaseException) -> list[str]:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    above = [] if cause is None else [*_lines(cause), "and then:"]
    frames = [line.rstrip("\n") for line in traceback.format_tb(error.__traceback__)]
    text = str(error) if isinstance(error, _PLAIN) else "(its text may hold what a client has sent)"
    return [*above, *frames, f"{type(error).__qualname__}: {text}"]
