"""What is made of logits, and the two ways to a relevance score: a reranker's own, and similarity."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np

from backends.contract import MAX_CHARS_PER_TOKEN, Task
from gateway.batches import Array
from gateway.catalog import Catalog
from gateway.errors import AnswerTooLarge, BadRequest, WrongTask
from gateway.inference import Inference
from gateway.kinds import DEFAULT_WEIGHTS, KIND_TASKS, kinds_to_tasks
from gateway.pipeline import Pipeline
from gateway.similarity import count_products, mixed_scores
from gateway.tasks import Items, Representations, Side, TextOptions, classify, represent_sides


def activate(logits: Array, activation: str) -> Array:
    """float32 [n, labels] by identity, sigmoid or softmax over the labels."""
    values = logits.astype(np.float64)
    if activation == "sigmoid":
        # Both halves are written so that nothing overflows.
        small = np.exp(-np.abs(values))
        values = np.where(values >= 0, 1 / (1 + small), small / (1 + small))
    elif activation == "softmax":
        values = np.exp(values - values.max(-1, keepdims=True))
        values /= values.sum(-1, keepdims=True)
    result: Array = values.astype(np.float32)
    return result


@dataclass(frozen=True)
class Scores:
    """Relevance of pairs, in the order of the request."""

    values: Array
    """float32 [n]."""
    raw: Array
    """float32 [n]: the same before the activation, which makes equals of what is not."""
    n_tokens: int
    is_truncated: Array
    """bool [n]."""


@dataclass(frozen=True)
class Scorer:
    """Scores pairs with whatever model is asked for."""

    inference: Inference
    catalog: Catalog
    calculator: Executor
    max_products: int

    async def find(self, model: str | None) -> Pipeline:
        """A reranker, else a model whose embeddings can be compared.

        Raises WrongTask, which says what the model is, or UnknownModel.
        """
        if not model:
            await self.catalog.find(None)
            known = self.catalog.pipelines
            rerankers = [p for p in known if Task.SCORE in p.tasks] or [p for p in known if kinds_of(p)]
            if rerankers:
                return rerankers[0]
        found = await self.catalog.find(model)
        if Task.SCORE in found.tasks or kinds_of(found):
            return found
        what = (
            f"a classifier with {len(found.labels)} labels"
            if found.labels
            else ", ".join(sorted(found.tasks))
        )
        raise WrongTask(
            f"the model {found.served_model_name} is no reranker: it is {what}",
            param="model",
            code="wrong_task",
        )

    async def rank(
        self,
        pipeline: Pipeline,
        query: str,
        documents: Sequence[str],
        options: TextOptions,
        activation: str | None,
        weights: Mapping[str, float] | None = None,
        names: tuple[str, str] = ("query", "documents"),
    ) -> Scores:
        """One query against documents, which the client calls by these `names`. `activation` None is the
        checkpoint's own.

        Raises GatewayError.
        """
        if Task.SCORE in pipeline.tasks:
            query = shorten(query, pipeline, options)
            pairs = [(query, shorten(document, pipeline, options)) for document in documents]
            return await self._classify(pipeline, pairs, options, activation, names[1])
        sides, chosen = await self._sides(pipeline, [query], documents, options, weights, names)
        check_products([sides], self.max_products)
        loop = asyncio.get_running_loop()
        values = await loop.run_in_executor(self.calculator, mixed_scores, *sides, chosen)
        left, right = sides
        tokens = int(left.n_tokens.sum() + right.n_tokens.sum())
        return Scores(values[0], values[0], tokens, right.is_truncated | left.is_truncated[0])

    async def score(
        self,
        pipeline: Pipeline,
        pairs: Sequence[tuple[str, str]],
        options: TextOptions,
        activation: str | None,
        weights: Mapping[str, float] | None = None,
        names: tuple[str, str] = ("text_1", "text_2"),
    ) -> Scores:
        """Pairs, each for itself, of what the client calls by these `names`. Raises GatewayError."""
        if Task.SCORE in pipeline.tasks:
            short = [(shorten(a, pipeline, options), shorten(b, pipeline, options)) for a, b in pairs]
            return await self._classify(pipeline, short, options, activation, names[1])
        firsts, seconds = [a for a, _ in pairs], [b for _, b in pairs]
        (left, right), chosen = await self._sides(pipeline, firsts, seconds, options, weights, names)
        rows = [(left.part(i, i + 1), right.part(i, i + 1)) for i in range(len(pairs))]
        check_products(rows, self.max_products)

        def by_row() -> Array:
            return np.array([mixed_scores(a, b, chosen)[0, 0] for a, b in rows], np.float32)

        values = await asyncio.get_running_loop().run_in_executor(self.calculator, by_row)
        tokens = int(left.n_tokens.sum() + right.n_tokens.sum())
        return Scores(values, values, tokens, left.is_truncated | right.is_truncated)

    async def _classify(
        self,
        pipeline: Pipeline,
        pairs: Sequence[tuple[str, str]],
        options: TextOptions,
        activation: str | None,
        field: str,
    ) -> Scores:
        made = await classify(self.inference, pipeline, Items.of_pairs(pairs), options, field)
        values = activate(made.logits, activation or pipeline.score_activation)[:, 0]
        return Scores(values, made.logits[:, 0], int(made.n_tokens.sum()), made.is_truncated)

    async def _sides(
        self,
        pipeline: Pipeline,
        left: Sequence[str],
        right: Sequence[str],
        options: TextOptions,
        weights: Mapping[str, float] | None,
        names: tuple[str, str],
    ) -> tuple[tuple[Representations, Representations], Mapping[str, float]]:
        chosen = weights or default_weights(pipeline)
        missing = [kind for kind in chosen if KIND_TASKS[kind] not in pipeline.tasks]
        if missing:
            raise BadRequest(
                f"the model {pipeline.served_model_name} has no {', '.join(missing)} embeddings to compare; "
                f"it has {', '.join(kinds_of(pipeline))}",
                param="weights",
            )
        sides = await represent_sides(
            self.inference,
            pipeline,
            Side(Items.of_texts(left), names[0], options.max_query_tokens or options.max_tokens),
            Side(Items.of_texts(right), names[1], options.max_document_tokens or options.max_tokens),
            kinds_to_tasks(chosen),
            # Without unit length a long vector would win over a fitting one.
            replace(options, normalize=True),
            has_roles=pipeline.has_roles or pipeline.has_role_prompts,
        )
        return sides, chosen


def shorten(text: str, pipeline: Pipeline, options: TextOptions) -> str:
    """What of a text can matter to the model, and a little more, so that it is still seen to be over the
    limit: a query goes with every document.
    """
    most = pipeline.max_length * MAX_CHARS_PER_TOKEN + 16
    if len(text) <= most:
        return text
    return text[-most:] if options.truncation == "left" else text[:most]


def default_weights(pipeline: Pipeline) -> dict[str, float]:
    """BGE-M3's mix for a model that has all three, else the first kind that it has."""
    kinds = kinds_of(pipeline)
    return dict(DEFAULT_WEIGHTS) if len(kinds) == len(DEFAULT_WEIGHTS) else {kinds[0]: 1.0}


def check_products(sides: Iterable[tuple[Representations, Representations]], most: int) -> None:
    """Raises AnswerTooLarge for more work than one request may ask for."""
    products = sum(count_products(*pair) for pair in sides)
    if products > most:
        raise AnswerTooLarge(
            f"the scores take {products:.1e} multiplications, and one request may take {most:.1e}; send "
            "fewer or shorter texts at a time (the operator can raise the limit with GATEWAY_MAX_PRODUCTS)"
        )


def kinds_of(pipeline: Pipeline) -> list[str]:
    """The kinds of embeddings that a model has."""
    return [kind for kind, task in KIND_TASKS.items() if task in pipeline.tasks]
