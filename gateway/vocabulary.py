"""What single tokens of a model read like, asked of the server once for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backends.contract import N_TOKENS, TOKEN_DTYPE, TOKEN_TEXTS, RequestParameter
from gateway.inference import Inference
from gateway.pipeline import Pipeline

# Ids of one question: a batch of SPLADE vectors names tens of thousands at first.
_MAX_IDS = 16384


class Vocabulary:
    """A cache of the texts of token ids, as large as the vocabularies of the models at most."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._texts: dict[str, tuple[tuple[str, tuple[str, ...]], dict[int, str]]] = {}
        """By model: of which checkpoint and stages they are, and the texts."""

    async def texts(self, pipeline: Pipeline, ids: Sequence[int]) -> dict[int, str]:
        """What each id alone decodes to, and maybe more ids. Raises GatewayError."""
        # A model of the same name that comes from elsewhere, or that was loaded anew, is another one.
        origin = (pipeline.checkpoint, pipeline.steps)
        last, known = self._texts.get(pipeline.name, (None, {}))
        if last != origin:
            known = {}
            self._texts[pipeline.name] = origin, known
        missing = sorted(set(ids) - known.keys())
        for start in range(0, len(missing), _MAX_IDS):
            wanted = missing[start : start + _MAX_IDS]
            answer = await self._inference.infer(
                pipeline,
                [np.array(wanted, TOKEN_DTYPE).tobytes()],
                (TOKEN_TEXTS, N_TOKENS),
                {RequestParameter.TEXT_FORMAT: "ids"},
                stage="tokenizer",
            )
            pieces = answer[TOKEN_TEXTS][0]
            known.update(zip(wanted, (piece.decode() for piece in pieces), strict=True))
        return known
