"""One rerank request in the words of all dialects, and its answer before any of them writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from gateway.answers import truncated_header
from gateway.errors import BadRequest
from gateway.inputs import (
    MAX_INT,
    SIDES,
    Numbers,
    Strings,
    read_instruction,
    read_limit,
    read_text,
    read_texts,
)
from gateway.kinds import read_weights
from gateway.pipeline import Pipeline
from gateway.scoring import Scorer
from gateway.tasks import TextOptions

_SIDE = Literal["left", "right", "Left", "Right"]


class RerankRequest(BaseModel):
    """The body of all routes; fields of other servers are ignored, null means absent."""

    model_config = ConfigDict(extra="ignore")

    query: Any = Field(description='A text, as a string or as {"text": ...}.')
    documents: Any = Field(None, description='A list of texts, as strings or as {"text": ...}.')
    texts: Any = Field(None, description="The documents, as text-embeddings-inference calls them.")
    model: str | None = Field(None, description="May be left out: the first reranker answers then.")
    instruction: str | None = Field(
        None,
        description="What the query is for, of models that are asked in words: it stands in their prompt.",
    )
    instruct: str | None = Field(None, description="The same in the words of SGLang and RTP-LLM.")
    top_n: StrictInt | None = Field(None, ge=0, le=MAX_INT, description="Give so many; 0 is all.")
    top_k: StrictInt | None = Field(None, ge=0, le=MAX_INT, description="The same, in Voyage's words.")
    sorted: StrictBool | None = Field(
        None, description="Best first (the default), or in the order of the request."
    )
    return_documents: StrictBool | None = None
    return_text: StrictBool | None = None
    rank_fields: Strings | None = Field(
        None, description="Fields of a document that is an object; text without."
    )
    normalize: StrictBool | None = Field(None, description="Scores between 0 and 1, or raw logits.")
    raw_scores: StrictBool | None = Field(None, description="The opposite.")
    use_activation: StrictBool | None = Field(None, description="As the checkpoint says, or raw logits.")
    truncation: StrictBool | None = Field(None, description="Cut what is over the limit, or refuse it.")
    truncate: StrictBool | None = None
    truncation_side: _SIDE | None = None
    truncation_direction: _SIDE | None = None
    truncate_only_documents: StrictBool | None = Field(
        None, description="Cut the document only, not whichever text is longer."
    )
    max_tokens_per_query: StrictInt | None = Field(None, ge=1, le=MAX_INT)
    max_tokens_per_doc: StrictInt | None = Field(None, ge=1, le=MAX_INT)
    truncate_prompt_tokens: StrictInt | None = Field(
        None, ge=-1, le=MAX_INT, description="Cut a pair to so many tokens; -1 is the model's own limit."
    )
    weights: dict[str, float] | Numbers | None = Field(
        None, description="For models without a reranking head: of dense, sparse and colbert similarity."
    )


@dataclass(frozen=True)
class Hit:
    """One document of an answer."""

    index: int
    score: float
    text: str
    is_truncated: bool


@dataclass(frozen=True)
class Ranking:
    """What an answer says besides the documents."""

    model: str
    n_tokens: int


async def rerank(
    scorer: Scorer,
    body: RerankRequest,
    max_documents: int,
    *,
    prefers_logits: bool = False,
    field: str = "documents",
) -> tuple[Ranking, list[Hit]]:
    """What a request asks for: the documents, best first, in the words of any dialect. Raises GatewayError.

    `prefers_logits` gives raw logits to a request that does not say, unless the model's makers do otherwise
    themselves. `field` is what the client calls the documents.
    """
    query = read_text(body.query, "query")
    if body.documents is None:
        other = " (text-embeddings-inference calls it texts)" if field == "documents" else ""
        raise BadRequest(f"the field {field} is missing{other}", param=field)
    documents = read_texts(body.documents, max_documents, field, body.rank_fields)
    pipeline = await scorer.find(body.model)
    weights = read_weights(body.weights)
    scores = await scorer.rank(
        pipeline,
        query,
        documents,
        _options(body, pipeline),
        _activation(body, "identity" if prefers_logits and not pipeline.score_is_probability else None),
        weights,
        ("query", field),
    )
    order = np.arange(len(documents))
    if body.sorted is not False:
        # Stable: documents with the same score keep their order.
        order = np.argsort(-scores.raw, kind="stable")
    most = body.top_n or body.top_k or len(documents)
    hits = [
        Hit(int(i), float(scores.values[i]), documents[i], bool(scores.is_truncated[i])) for i in order[:most]
    ]
    return Ranking(body.model or pipeline.served_model_name, scores.n_tokens), hits


def _activation(body: RerankRequest, default: str | None) -> str | None:
    if body.normalize is not None:
        return "sigmoid" if body.normalize else "identity"
    if body.raw_scores is not None:
        return "identity" if body.raw_scores else "sigmoid"
    if body.use_activation is not None:
        return None if body.use_activation else "identity"
    return default


def _options(body: RerankRequest, pipeline: Pipeline) -> TextOptions:
    """Rerankers cut what is over the limit, as everybody's do, unless they are told not to."""
    asked = body.truncation if body.truncation is not None else body.truncate
    side = body.truncation_side or body.truncation_direction
    truncation = "document" if body.truncate_only_documents else SIDES[side or "right"]
    return TextOptions(
        instruction=read_instruction(body.instruction, body.instruct, pipeline),
        truncation="error" if asked is False else truncation,
        max_tokens=read_limit(body.truncate_prompt_tokens),
        max_query_tokens=body.max_tokens_per_query,
        max_document_tokens=body.max_tokens_per_doc,
    )


def tei_rows(body: RerankRequest, hits: list[Hit]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """text-embeddings-inference's answer, and its headers."""
    rows = [
        {"index": hit.index, "score": hit.score, **({"text": hit.text} if body.return_text else {})}
        for hit in hits
    ]
    return rows, truncated_header(sorted(hit.index for hit in hits if hit.is_truncated))


def tei_request(body: RerankRequest) -> RerankRequest:
    """A request with `texts` in the words of the others: all of it, and sigmoid unless raw_scores."""
    return body.model_copy(
        update={"documents": body.texts, "raw_scores": bool(body.raw_scores), "top_n": None, "top_k": None}
    )
