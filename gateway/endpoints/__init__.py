"""The HTTP dialects. One file each; a new dialect is a file and a line here."""

from __future__ import annotations

from gateway.endpoints import admin, classify, cohere, hybrid, openai, operations, rerank, rtp_llm, score, tei
from gateway.endpoints.dialect import Dialect

ADMIN = "admin"
"""The one that is there only where the settings say so."""
DIALECTS: dict[str, Dialect] = {
    "openai": openai.DIALECT,
    "hybrid": hybrid.DIALECT,
    "rtp_llm": rtp_llm.DIALECT,
    "tei": tei.DIALECT,
    "cohere": cohere.DIALECT,
    "rerank": rerank.DIALECT,
    "score": score.DIALECT,
    "classify": classify.DIALECT,
    "operations": operations.DIALECT,
    ADMIN: admin.DIALECT,
}

DEFAULT_DIALECT = openai.DIALECT
"""Speaks where a request took no route at all."""
