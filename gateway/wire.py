"""Bytes of HTTP bodies: reading them within limits, checking them, and writing answers straight from
arrays.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import Request, Response
from pydantic import BaseModel, ValidationError

from gateway.body_shape import check_shape
from gateway.byte_budget import ByteBudget
from gateway.errors import BadRequest, BodyTooLarge, shorten
from gateway.urgency import read_fields, read_headers

Item = TypeVar("Item")
Body = TypeVar("Body", bound=BaseModel)

# A body over the limit is still read to its end, and thrown away, up to so many times the limit: a client
# that sends does not listen, and a connection that is closed under it tells nothing.
_DISCARDED = 8
# Numbers that are written as JSON without a break.
_NUMBERS_AT_ONCE = 200_000


async def read(request: Request, model: type[Body], max_bytes: int) -> Body:
    """The request's JSON body as a model. Raises BadRequest or BodyTooLarge."""
    return check(model, parse(await read_bytes(request, max_bytes)))


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """The body, of which no more is taken in than the limit; takes note of the headers that say how urgent
    it is. Raises BadRequest, BodyTooLarge or Unavailable.
    """
    length = request.headers.get("content-length", "")
    declared = int(length) if length.isdecimal() and len(length) < 20 else 0
    is_waiting = request.headers.get("expect", "").lower() == "100-continue"
    if is_waiting and declared > max_bytes:
        raise _too_large(max_bytes)
    budget: ByteBudget = request.app.state.body_budget
    chunks = []
    size = 0
    with budget.enter(declared if declared <= max_bytes else 0) as held:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= max_bytes:
                held.add(len(chunk))
                chunks.append(chunk)
            elif size > max_bytes * _DISCARDED:
                break
            else:
                chunks.clear()
                held.close()
    if size > max_bytes:
        raise _too_large(max_bytes)
    read_headers(request.headers)
    return b"".join(chunks)


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object; takes note of its fields that say how urgent it is, which all dialects have.

    Raises BadRequest, which says where the JSON breaks off, or BodyTooLarge.
    """
    if not body:
        raise BadRequest("the body is empty; a JSON object belongs there")
    check_shape(body)
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise BadRequest(
            f"the body is a JSON {_kind(content)}; a JSON object belongs there", code="invalid_json"
        )
    read_fields(content)
    return content


def check(model: type[Body], content: Mapping[str, Any]) -> Body:
    """The content as a model. Raises BadRequest, which names the first field at fault."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # Parts of a path that are no field of the request: names of validators, and of alternatives.
        field = ".".join(
            str(part) for part in first["loc"] if not re.search(r"^function-|\[|^(dict|list)$", str(part))
        )
        if first["type"] == "missing":
            raise BadRequest(f"the field {field} is missing", param=field) from None
        raise BadRequest(f"{field} is {shorten(first['input'])}: {_explain(first)}", param=field) from None


async def matrix(values: npt.NDArray[Any]) -> Any:
    """A matrix as JSON will have it. A large one is written in pieces, so that other requests get their turn.

    orjson writes 30 million numbers a second and holds the interpreter meanwhile.
    """
    if values.size <= _NUMBERS_AT_ONCE:
        return np.ascontiguousarray(values)
    rows = max(1, _NUMBERS_AT_ONCE // values.shape[1])
    pieces = []
    for start in range(0, len(values), rows):
        piece = orjson.dumps(
            np.ascontiguousarray(values[start : start + rows]), option=orjson.OPT_SERIALIZE_NUMPY
        )
        pieces.append(piece[1:-1])
        await asyncio.sleep(0)
    return orjson.Fragment(b"[" + b",".join(pieces) + b"]")


async def in_turns(items: Iterable[Item], write: Callable[[Item], Any], each: int = 64) -> list[Any]:
    """write(item) of every item as JSON will have it; between some of them other requests get their turn.

    What is written at once is small; the whole of it would be a long time of Python, and a mountain of
    objects.
    """
    written = []
    for i, item in enumerate(items, 1):
        written.append(orjson.Fragment(orjson.dumps(write(item))))
        if i % each == 0:
            await asyncio.sleep(0)
    return written


def respond(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response; numpy arrays in the content are written without a detour over Python numbers."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, dict(headers or {}), "application/json")


def to_base64(row: npt.NDArray[Any]) -> str:
    """Little-endian float32 numbers in base64, as OpenAI's clients read them."""
    return base64.b64encode(np.ascontiguousarray(row, "<f4").data).decode("ascii")


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body is larger than {max_bytes} bytes; send fewer inputs at a time (the operator can raise the "
        "limit with GATEWAY_MAX_BODY_BYTES)"
    )


_EXPLANATIONS = {
    "model_type": "it should be an object",
    "model_attributes_type": "it should be an object",
    "dict_type": "it should be an object",
    "too_short": "it should have at least one item",
    "int_type": "it should be a whole number",
}


def _explain(error: Any) -> str:
    if error["type"] in _EXPLANATIONS:
        return _EXPLANATIONS[error["type"]]
    text: str = error["msg"]
    return text.removeprefix("Value error, ").replace("Input should be", "it should be")


def _kind(content: Any) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(content), "number")
