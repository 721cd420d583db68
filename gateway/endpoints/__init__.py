"""The HTTP dialects. One file each; a new dialect is a file and a line here."""

from __future__ import annotations

from gateway.endpoints import openai, operations
from gateway.endpoints.dialect import Dialect

DIALECTS: dict[str, Dialect] = {"openai": openai.DIALECT, "operations": operations.DIALECT}

DEFAULT_DIALECT = openai.DIALECT
"""Speaks where a request took no route at all."""
