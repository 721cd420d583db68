"""The tokenizer stage: text [n, 1] -> input_ids [1, t], length [1, n], n_tokens [n, 1], truncated [n, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backends.contract import INPUT_IDS, LENGTH, N_TOKENS, PROMPT_LENGTH, TEXT, TRUNCATED, ErrorCode
from backends.errors import RequestError
from backends.families import family_of
from backends.stages.base import Answer, Stage, StageContext, StageRequest
from backends.tokenization import TextTokenizer, TokenizerSettings


class TokenizerStage(Stage):
    """Tokenises each request on its own, as its parameters say."""

    def setup(self, context: StageContext) -> None:
        family = family_of(context.checkpoint, context.options.model_type)
        self.tokenizer = TextTokenizer(context.checkpoint, family.max_length(context.checkpoint))
        self.truncation = context.options.truncation

    def run(self, batch: Sequence[StageRequest]) -> list[Answer | RequestError]:
        return [self._tokenize(request) for request in batch]

    def _tokenize(self, request: StageRequest) -> Answer | RequestError:
        try:
            settings = TokenizerSettings.read(request.parameters, self.tokenizer.checkpoint, self.truncation)
            text = request.array(TEXT)
            if text.shape[1] != 1:
                raise RequestError(
                    ErrorCode.INVALID_INPUT,
                    f"text has shape {list(text.shape)}; this model takes [n, 1], one text each",
                )
            rows = self.tokenizer.encode(text[:, 0].tolist(), settings)
        except RequestError as error:
            return error
        length = np.array([len(row.ids) for row in rows], np.int32)
        return {
            INPUT_IDS: np.concatenate([row.ids for row in rows])[None],
            LENGTH: length[None],
            PROMPT_LENGTH: np.array([[row.prompt_length for row in rows]], np.int32),
            N_TOKENS: length[:, None],
            TRUNCATED: np.array([[row.is_truncated] for row in rows]),
        }
