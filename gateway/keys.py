"""API keys: who may come in, what each may use, and the file that says so.

Nothing here holds a key in plain: a file has SHA-256 hashes, and what a client sends is hashed before it is
compared. A plain hash is enough for keys that a machine made; a password of a person would need a slow one.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gateway.context import Lane

logger = logging.getLogger(__name__)

# What clients can put into a header as it is.
_KEY = re.compile(r"[!-~]{8,512}")
_HINT = "triton-embeddings hash-key makes a key and its line"


class UnusableKeys(ValueError):
    """Keys that cannot be used. Its text is for the operator, and has no key in it."""


@dataclass(frozen=True)
class Key:
    """One client's key, and what it may do."""

    name: str
    digest: bytes
    """SHA-256 of the key."""
    models: frozenset[str] | None = None
    """Names of the models that it may use; None is all."""
    lane: Lane | None = None
    tokens_per_minute: int | None = None


class _Entry(BaseModel):
    """A key as the file has it. Words that are not known are errors: a typing mistake in `models` would let
    the key use all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=100)
    sha256: str = Field(pattern=r"^[0-9a-fA-F]{64}$")
    models: list[str] | None = Field(None, min_length=1)
    lane: Lane | None = None
    tokens_per_minute: int | None = Field(None, ge=1)

    def key(self) -> Key:
        models = None if self.models is None else frozenset(self.models)
        return Key(self.name, bytes.fromhex(self.sha256), models, self.lane, self.tokens_per_minute)


_ENTRIES = TypeAdapter(list[_Entry])


def digest_of(key: str) -> bytes:
    """What is kept of a key. Whatever a client may send has one."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def check_key(key: str, name: str) -> str:
    """A plain key that an operator gives under a name. Raises UnusableKeys."""
    if not _KEY.fullmatch(key):
        raise UnusableKeys(
            f"{name} cannot be a key: a key has 8 to 512 letters, digits and signs of ASCII, without blanks; "
            f"{_HINT}"
        )
    return key


def read_keys(file: Path) -> list[Key]:
    """The keys of a JSON or TOML file: a list of entries, or `keys` with such a list (TOML's [[keys]]).

    Raises UnusableKeys.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UnusableKeys(f"{file} cannot be read: {reason}") from None
    try:
        content: Any = tomllib.loads(text) if file.suffix == ".toml" else orjson.loads(text)
    except ValueError as error:
        kind = "TOML" if file.suffix == ".toml" else "JSON"
        raise UnusableKeys(f"{file} is not valid {kind}: {error}") from None
    entries = content.get("keys") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise UnusableKeys(f"{file} has no list of keys; {_HINT}")
    try:
        keys = [entry.key() for entry in _ENTRIES.validate_python(entries)]
    except ValidationError as error:
        raise UnusableKeys(f"{file}: {_explain(error, entries)}") from None
    names = [key.name for key in keys]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UnusableKeys(f"{file} has two keys of the name {twice!r}; give one of them another")
    return keys


def _explain(error: ValidationError, entries: Sequence[Any]) -> str:
    """What is wrong with the first entry at fault. Values are not shown: one may be a key."""
    first = error.errors(include_url=False, include_input=False)[0]
    place, *rest = first["loc"]
    entry = entries[int(place)]
    name = f" ({entry['name']})" if isinstance(entry, dict) and isinstance(entry.get("name"), str) else ""
    field = ".".join(map(str, rest)) or "it"
    if field == "sha256" and first["type"] != "missing":
        return f"entry {place}{name}: sha256 is no hash of 64 hexadecimal digits; {_HINT}"
    return f"entry {place}{name}: {field}: {first['msg'][:1].lower()}{first['msg'][1:]}"


class Keys:
    """All that are known, looked at anew when the file changes. One for each application."""

    def __init__(
        self,
        fixed: Sequence[Key] = (),
        file: Path | None = None,
        read: Callable[[Path], list[Key]] = read_keys,
    ) -> None:
        """Raises UnusableKeys for a file that cannot be read: there are no earlier keys to go on with."""
        self._fixed = list(fixed)
        self._file = file
        self._read = read
        self._state = None if file is None else _state(file)
        self._keys = [*self._fixed, *([] if file is None else read(file))]

    @property
    def are_asked_for(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._fixed) or self._file is not None

    def find(self, given: Sequence[str]) -> Key | None:
        """The key that is among those that a request brings. The time it takes tells nothing of any key."""
        self._refresh()
        found = None
        for digest in map(digest_of, given):
            for key in self._keys:
                if hmac.compare_digest(digest, key.digest) and found is None:
                    found = key
        return found

    def _refresh(self) -> None:
        """A look at the file costs microseconds, so that a key that is taken out is gone at once."""
        if self._file is None or (state := _state(self._file)) == self._state:
            return
        self._state = state
        try:
            keys = self._read(self._file)
        except UnusableKeys as error:
            logger.error("the keys stay as they were: %s", error)
            return
        self._keys = [*self._fixed, *keys]
        logger.warning("the keys were read anew: there are %d", len(self._keys))


def _state(file: Path) -> tuple[int, int, int] | None:
    """Changes with the file; None for one that is not there."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
