"""The tasks that endpoints ask for, in terms of the contract with the server. Knows neither HTTP nor gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.contract import (
    ACCOUNT_OUTPUTS,
    DENSE,
    N_TOKENS,
    TASK_OUTPUTS,
    TOKEN_DTYPE,
    TRUNCATED,
    RequestParameter,
    Task,
)
from gateway.errors import BadRequest
from gateway.inference import Inference, Pipeline


@dataclass(frozen=True)
class Items:
    """The inputs of a request, as they travel in the tensor `text`."""

    elements: Sequence[bytes]
    has_ids: bool = False

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Items:
        """Texts as UTF-8."""
        return cls([text.encode() for text in texts])

    @classmethod
    def of_ids(cls, rows: Sequence[Sequence[int]]) -> Items:
        """Token ids below 2**31."""
        return cls([np.array(row, TOKEN_DTYPE).tobytes() for row in rows], has_ids=True)


@dataclass(frozen=True)
class TextOptions:
    """What a request may say about its texts; None leaves it to the model."""

    prompt_name: str | None = None
    prompt: str | None = None
    truncation: str | None = None
    dimensions: int | None = None
    normalize: bool | None = None


@dataclass(frozen=True)
class Embeddings:
    """The answer to an embed task: one row for each item."""

    vectors: npt.NDArray[np.float32]
    """[n, d]."""
    n_tokens: npt.NDArray[np.int32]
    """[n], special tokens included."""
    is_truncated: npt.NDArray[np.bool_]
    """[n]."""


async def embed(inference: Inference, pipeline: Pipeline, items: Items, options: TextOptions) -> Embeddings:
    """Dense embeddings of texts. Raises GatewayError."""
    outputs = (*TASK_OUTPUTS[Task.EMBED], *ACCOUNT_OUTPUTS)
    rows = await inference.infer(pipeline, items.elements, outputs, _parameters(items, options))
    return Embeddings(rows[DENSE], rows[N_TOKENS][:, 0], rows[TRUNCATED][:, 0])


def _parameters(items: Items, options: TextOptions) -> dict[str, Any]:
    parameters = {
        RequestParameter.PROMPT_NAME: options.prompt_name,
        RequestParameter.PROMPT: options.prompt,
        RequestParameter.TRUNCATION: options.truncation,
        RequestParameter.DIMENSIONS: options.dimensions,
        RequestParameter.NORMALIZE: options.normalize,
        RequestParameter.TEXT_FORMAT: "ids" if items.has_ids else None,
    }
    for name, value in parameters.items():
        if isinstance(value, str) and "\0" in value:
            # The server hands parameters on as C strings: the rest would be lost without a word.
            raise BadRequest(
                f"{name} holds a NUL character, which cannot be sent on; leave it out", param=name
            )
    return {name: value for name, value in parameters.items() if value is not None}
