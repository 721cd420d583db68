"""Classification of texts or pairs, and text-embeddings-inference's request for it, which two routes take."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from backends.contract import Task
from gateway.answers import truncated_header
from gateway.batches import Array
from gateway.catalog import Catalog
from gateway.errors import BadRequest, EmptyInput
from gateway.inference import Inference
from gateway.inputs import SIDES, read_text
from gateway.pipeline import Pipeline
from gateway.scoring import activate
from gateway.tasks import Classified, Items, TextOptions, classify
from gateway.wire import in_turns

Text = str | tuple[str, str]


class PredictRequest(BaseModel):
    """The body of /predict."""

    model_config = ConfigDict(extra="ignore")

    inputs: Any = Field(
        description="A text; a pair, as a flat list of two strings; a batch, as lists of one or two."
    )
    model: str | None = None
    truncate: StrictBool | None = None
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None
    raw_scores: StrictBool | None = None
    instruction: str | None = None


async def predict(
    inference: Inference, catalog: Catalog, calculator: Executor, body: PredictRequest, most: int
) -> tuple[list[Any], dict[str, str]]:
    """text-embeddings-inference's answer, labels best first, and its headers. Raises GatewayError."""
    texts, is_batch = _read_inputs(body.inputs)
    if len(texts) > most:
        raise BadRequest(
            f"inputs has {len(texts)} texts; at most {most} can be sent in one request", param="inputs"
        )
    pipeline = await catalog.find(body.model, Task.CLASSIFY)
    truncation = None
    if body.truncate is not None:
        truncation = SIDES[body.truncation_direction or "right"] if body.truncate else "error"
    made = await logits(
        inference,
        pipeline,
        texts,
        TextOptions(instruction=body.instruction or None, truncation=truncation),
        "inputs",
    )
    activation = "identity" if body.raw_scores else pipeline.label_activation
    scores = await asyncio.get_running_loop().run_in_executor(calculator, activate, made.logits, activation)
    rows = await in_turns(scores, lambda row: labelled(pipeline, row))
    headers = truncated_header(made.is_truncated.nonzero()[0].tolist())
    # A list of one row and the row are told apart by what was sent.
    return (rows if is_batch else [*labelled(pipeline, scores[0])]), headers


def _read_inputs(value: Any) -> tuple[list[Text], bool]:
    """The texts, and whether the client sent a batch."""
    if isinstance(value, (str, dict)):
        return [read_text(value, "inputs")], False
    if not isinstance(value, list):
        raise BadRequest(
            "inputs takes a text, a pair, or a list of lists of one or two texts", param="inputs"
        )
    if not value:
        raise EmptyInput("inputs is an empty list; send at least one text", param="inputs")
    if all(isinstance(item, str) for item in value):
        if len(value) > 2:
            raise BadRequest(
                f"inputs is a flat list of {len(value)} strings; one or two are one text or one pair, and a "
                "batch is a list of lists",
                param="inputs",
            )
        return [text_or_pair(value, "inputs")], False
    return [text_or_pair(item, f"inputs[{i}]") for i, item in enumerate(value)], True


def text_or_pair(item: Any, field: str) -> Text:
    """A text, or a list of one or two. Raises BadRequest."""
    if not isinstance(item, list):
        return read_text(item, field)
    if len(item) == 1:
        return read_text(item[0], field)
    if len(item) != 2:
        raise BadRequest(f"{field} has {len(item)} texts; a pair has two", param=field.split("[")[0])
    return read_text(item[0], f"{field}[0]"), read_text(item[1], f"{field}[1]", may_be_empty=True)


async def logits(
    inference: Inference, pipeline: Pipeline, texts: Sequence[Text], options: TextOptions, field: str
) -> Classified:
    """Logits of texts or of pairs, not of both at once. Raises GatewayError."""
    is_pair = [isinstance(text, tuple) for text in texts]
    if any(is_pair) and not all(is_pair):
        odd = is_pair.index(not is_pair[0])
        raise BadRequest(
            f"{field}[{odd}] is {'a pair' if is_pair[odd] else 'a text'}, and those before it are not; send "
            "texts and pairs in requests of their own",
            param=field,
        )
    if is_pair[0]:
        items = Items.of_pairs(text for text in texts if isinstance(text, tuple))
    else:
        items = Items.of_texts([text for text in texts if isinstance(text, str)])
    return await classify(inference, pipeline, items, options, field)


def labelled(pipeline: Pipeline, row: Array) -> list[dict[str, Any]]:
    """Labels and their scores, best first."""
    order = np.argsort(-row, kind="stable").tolist()
    return [{"score": float(row[i]), "label": pipeline.labels[i]} for i in order]
