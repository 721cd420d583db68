import json
import logging

import pytest

from gateway.context import RequestContext, enter
from gateway.logs import JsonFormatter, TextFormatter


def record(message="a model does not answer", error=None, **extra):
    info = None if error is None else (type(error), error, error.__traceback__)
    made = logging.LogRecord("gateway.x", logging.WARNING, "x.py", 1, message, None, info)
    made.__dict__.update(extra)
    return made


def failing(text):
    try:
        try:
            raise KeyError(text)
        except KeyError as cause:
            raise ValueError(text) from cause
    except ValueError as error:
        return error


async def test_a_line_of_json_names_its_request():
    enter(RequestContext("id-1", model="m", traceparent=f"00-{'a' * 32}-{'b' * 16}-01"))
    line = json.loads(JsonFormatter().format(record(status=200, duration_ms=1.5)))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "warning",
        "logger": "gateway.x",
        "message": "a model does not answer",
        "request_id": "id-1",
        "model": "m",
        "trace_id": "a" * 32,
        "status": 200,
        "duration_ms": 1.5,
    }


async def test_outside_of_a_request_there_is_none():
    assert "request" not in JsonFormatter().format(record())
    assert TextFormatter().format(record()).endswith("WARNING gateway.x: a model does not answer")


async def test_a_line_of_text_names_its_request():
    enter(RequestContext("id-1"))
    assert TextFormatter().format(record()).endswith("a model does not answer [request id-1]")


@pytest.mark.parametrize("kind", [TextFormatter, JsonFormatter])
def test_what_an_exception_quotes_is_not_logged_unless_asked_for(kind):
    error = failing("a user's text")
    assert "a user's text" in kind(shows_texts=True).format(record(error=error))
    line = kind().format(record(error=error))
    assert "user" not in line
    assert "ValueError" in line
    assert "KeyError" in line
    assert "in failing" in line
