"""Request bodies that nobody would send who means well, made from good ones by a seeded random."""

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Values that stand where something else was expected.
_ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**30,
    1.5,
    -0.0,
    1e308,
    5e-324,
    "",
    " ",
    "\0",
    "a\0b",
    "\u202e\u0000\uffff",
    "👩‍👩‍👧‍👦" * 20,
    "e\u0301" * 50,
    "x" * 2000,
    "ÄÖ" * 700,
    "%s%n{}{0}$(id)",
    "../../../etc/passwd",
    "http://169.254.169.254/latest",
    "data:image/png;base64,AAAA",
    "data:,",
    [],
    {},
    [[]],
    [{}],
    [None],
    [[1, 2], [3]],
    [0, "a"],
    [True, False],
    [-1, 2**31],
    [[2**31 - 1]],
    {"text": "a"},
    {"text": None},
    {"image": "x"},
    {"content": [{"type": "text", "text": "a"}]},
    {"content": [{"type": "video_url"}]},
    {"url": "x"},
    {"": ""},
    {"dense": 1},
    [0.5, 0.5, 0.0],
    [1e308, 1e308, 1e308],
    ["a", "b"],
    ["a", ["b"]],
    [["a", "b"], ["c"]],
    [["a", "b", "c"]],
    "END",
    "dense",
    "query",
    "right",
    "org/m3",
    "tiny",
    "base64",
)
# What no JSON writer makes: a mark in the body is put in its place afterwards.
_MARK = "\u2603mark\u2603"
_RAW = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"-1e-999",
    b"9" * 400,
    b"-",
    b"01",
    b"0x10",
    b"'a'",
    b"undefined",
    b'"\\ud800"',
    b'"\\udfff\\ud800"',
    b'"\xff\xfe"',
    b'"\xed\xa0\x80"',
    b'"\xf4\x90\x80\x80"',
    b'"\x00"',
    b'"a\nb"',
    b'"\\x41"',
    b"[" * 70 + b"]" * 70,
    b'{"a":' * 70 + b"1" + b"}" * 70,
    b"[" * 1000 + b"]" * 1000,
    b"[" * 10_000 + b"]" * 10_000,
    b"[" * 10_000,
    b"/* */ 1",
    b"",
)
_TYPES = (
    "application/json",
    "application/json; charset=utf-16",
    "text/plain",
    "multipart/form-data; boundary=x",
    "application/x-www-form-urlencoded",
    "application/octet-stream",
    "\xff",
    "",
)
_ENCODINGS = ("gzip", "br", "identity", "x")


@dataclass(frozen=True)
class Mutant:
    """One request."""

    path: str
    body: bytes
    headers: dict[str, str]
    method: str = "POST"


def mutants(good: dict[str, list[dict[str, Any]]], count: int, seed: int) -> Iterator[Mutant]:
    """So many requests, made of good bodies by path; the same for the same seed."""
    chance = random.Random(seed)
    paths = sorted(good)
    fields = sorted({name for bodies in good.values() for body in bodies for name in body})
    for i in range(count):
        path = paths[i % len(paths)]
        body = json.loads(json.dumps(chance.choice(good[path])))
        headers = {"content-type": chance.choice(_TYPES) if chance.random() < 0.1 else _TYPES[0]}
        if chance.random() < 0.02:
            headers["content-encoding"] = chance.choice(_ENCODINGS)
        raw = None
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            raw = _change(body, fields, chance) or raw
        data = json.dumps(body, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
        if raw is not None:
            data = data.replace(json.dumps(_MARK).encode(), raw).replace(f'"{_MARK}"'.encode(), raw)
        method = (
            "POST" if chance.random() > 0.01 else chance.choice(("GET", "PUT", "PATCH", "DELETE", "HEAD"))
        )
        yield Mutant(path, _damage(data, chance), headers, method)


def _change(body: dict[str, Any], fields: list[str], chance: random.Random) -> bytes | None:
    """Changes one place of a body; the bytes that belong at the mark, if it put one there."""
    holder, key = _place(body, chance)
    kind = chance.random()
    if kind < 0.15:
        holder[key] = _MARK
        return chance.choice(_RAW)
    if kind < 0.55:
        holder[key] = _odd(chance)
    elif kind < 0.65:
        body.pop(chance.choice(list(body)), None) if body else None
    elif kind < 0.85:
        # A field of another route, or of the same.
        body[chance.choice(fields)] = _odd(chance)
    elif kind < 0.92:
        holder[key] = [holder[key]] * chance.choice((1, 2, 3, 70, 300))
    elif kind < 0.96:
        for _ in range(chance.choice((1, 5, 80, 300))):
            holder[key] = [holder[key]] if chance.random() < 0.5 else {"text": holder[key]}
    else:
        body[chance.choice(("\0", "é" * 300, "__proto__", "model ", "MODEL"))] = _odd(chance)
    return None


def _odd(chance: random.Random) -> Any:
    # A copy, for later changes may go into it.
    return copy.deepcopy(chance.choice(_ODD))


def _place(body: dict[str, Any], chance: random.Random) -> tuple[Any, Any]:
    """A place in the body, seldom a deep one."""
    if not body:
        body["input"] = "a"
    holder: Any = body
    key: Any = chance.choice(list(body))
    while isinstance(holder[key], (dict, list)) and holder[key] and chance.random() < 0.6:
        holder = holder[key]
        key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
    return holder, key


def _damage(data: bytes, chance: random.Random) -> bytes:
    """Seldom: the body as a whole is cut, doubled, or has some bytes changed."""
    kind = chance.random()
    if kind < 0.85:
        return data
    if kind < 0.89:
        return data[: chance.randrange(len(data) + 1)]
    if kind < 0.91:
        return b""
    if kind < 0.93:
        return chance.randbytes(chance.randrange(200))
    if kind < 0.95:
        # The same fields twice.
        return data[:-1] + b"," + data[1:]
    if kind < 0.96:
        return b"\xef\xbb\xbf" + data
    if kind < 0.97:
        return data.decode("utf-8", "replace").encode("utf-16")
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        if changed:
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def good_bodies(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The examples of an OpenAPI document by path, and some that are not in it."""
    found = {
        path: [methods["post"]["requestBody"]["content"]["application/json"]["example"]]
        for path, methods in document["paths"].items()
        if "post" in methods
    }
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, image]}
    for path in ("/v1/embeddings", "/v1/embeddings/hybrid", "/v1/embeddings/dense"):
        found[path] += [
            {"input": [[1, 2, 3], [4]], "encoding_format": "base64", "truncate": True},
            {"messages": [{"role": "system", "content": "be good"}, message], "model": "org/gme"},
            {"input": [{"text": "a", "image": ["data:image/png;base64,iVBORw0KGgo="]}, "b"]},
            {
                "input": "a",
                "embedding_types": ["dense", "sparse"],
                "prompt_name": "query",
                "normalize": False,
            },
        ]
    for path in ("/rerank", "/v1/rerank", "/v2/rerank", "/v1/reranker", "/infinity/rerank"):
        found[path] += [
            {"query": "a", "texts": ["b", "c"], "raw_scores": True},
            {
                "query": {"text": "a"},
                "documents": [{"text": "b", "id": {"x": 1}}],
                "rank_fields": ["text", "id"],
            },
            {"query": "a", "documents": ["b"], "weights": [1, 0, 0], "model": "org/m3", "top_n": 1},
        ]
    found["/v1/embeddings/similarity"].append(
        {"left": ["a"], "right": ["b"], "embedding_config": {"type": "hybrid"}, "weights": {"dense": 1}}
    )
    found["/v2/embed"].append({"inputs": [{"content": [image]}], "embedding_types": ["int8", "ubinary"]})
    found["/"] = [
        {"inputs": ["a"]},
        {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
        {"texts": ["a"]},
    ]
    found["/v1/score"].append({"text_1": ["a", "b"], "text_2": ["c", "d"], "truncate_prompt_tokens": 5})
    return found
