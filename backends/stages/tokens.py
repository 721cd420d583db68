"""The tokens stage: hidden [1, t, h], input_ids [1, t] -> token_embeddings [1, t, h] float32, token_ids [1,
t].

Without torch where hidden states come as float32: a process that only hands numbers on stays small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.contract import (
    HIDDEN,
    INPUT_IDS,
    TOKEN_EMBEDDINGS,
    TOKEN_IDS,
)
from backends.errors import RequestError
from backends.heads.tokens import check_normalize
from backends.options import WIRE_DTYPES
from backends.stages.base import Stage, StageContext
from backends.stages.request import StageRequest
from backends.stages.response import Answer


class TokensStage(Stage):
    """Hands hidden states on to the client, normalised where it asks for that."""

    def setup(self, context: StageContext) -> None:
        self.is_float32 = WIRE_DTYPES[context.options.dtype] == "FP32" and context.device == "cpu"

    def run(self, batch: Sequence[StageRequest]) -> list[Answer | RequestError]:
        return [self._answer(request) for request in batch]

    def _answer(self, request: StageRequest) -> Answer | RequestError:
        try:
            normalize = check_normalize(request.parameters)
        except RequestError as error:
            return error
        values = self._hidden(request)
        if normalize:
            values = values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
        return {TOKEN_EMBEDDINGS: values, TOKEN_IDS: request.array(INPUT_IDS)}

    def _hidden(self, request: StageRequest) -> npt.NDArray[Any]:
        if self.is_float32:
            return request.array(HIDDEN)
        # numpy has no bfloat16.
        values: npt.NDArray[Any] = request.tensor(HIDDEN).float().cpu().numpy()
        return values
