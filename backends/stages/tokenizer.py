"""The tokenizer stage: text [n, 1] -> input_ids [1, t], length [1, n], n_tokens [n, 1], truncated [n, 1] ...

Called directly, past the ensemble, it tells what a person wants to know of tokens: their texts and places in
the text, and the text of token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.chat_prompt import CHAT_PROMPTS
from backends.checkpoint import NO_LIMIT
from backends.clock import now_us
from backends.content_tokens import ContentTokenizer
from backends.contract import (
    DECODED,
    FIRST_LENGTH,
    GRID,
    IMAGE_GRID,
    INPUT_IDS,
    IS_SPECIAL,
    KEY_LENGTH,
    LENGTH,
    N_TOKENS,
    PATCHES,
    PROMPT_LENGTH,
    TEXT,
    TOKEN_SPANS,
    TOKEN_TEXTS,
    TOKENIZER_TIMES,
    TRUNCATED,
    ErrorCode,
    RequestParameter,
)
from backends.errors import RequestError
from backends.families import family_of
from backends.heads import late_interaction, takes_pairs
from backends.instruction import instruction_template
from backends.prompted_pairs import PromptedPairs
from backends.rerank_prompt import rerank_prompt_of
from backends.stages.base import Stage, StageContext
from backends.stages.request import StageRequest
from backends.stages.response import Answer
from backends.template_pairs import TemplatePairs
from backends.tokenization import TextTokenizer, Tokens
from backends.tokenizer_settings import TokenizerSettings

_PROMPTING = frozenset(
    {
        RequestParameter.PROMPT,
        RequestParameter.PROMPT_NAME,
        RequestParameter.INSTRUCTION,
        RequestParameter.ROLE,
    }
)
_DESCRIPTION = frozenset({TOKEN_TEXTS, TOKEN_SPANS, IS_SPECIAL})


class TokenizerStage(Stage):
    """Tokenises each request on its own, as its parameters say."""

    def setup(self, context: StageContext) -> None:
        checkpoint = context.checkpoint
        family = family_of(checkpoint, context.options.model_type)
        self.late = late_interaction(checkpoint, context.heads)
        most_tokens = min(family.most_tokens(checkpoint), context.options.max_length or NO_LIMIT)
        vision = family.vision
        name = None if vision is None else context.options.chat_template or vision.chat_prompt
        self.chat = None if name is None else CHAT_PROMPTS[name]
        self.tokenizer = TextTokenizer(
            checkpoint,
            family.max_length(checkpoint),
            self.late,
            most_tokens,
            family.last_token(checkpoint.config),
            self.chat,
        )
        self.contents: ContentTokenizer | None = None
        if vision is not None:
            self.contents = ContentTokenizer(self.tokenizer, vision.tokens(checkpoint.config), self.chat)
            self.patch_width = 3 * vision.processor(checkpoint, context.options).patch_size ** 2
        self.takes_pairs = takes_pairs(context.heads)
        # A text alone goes to a reranker or classifier as it stands.
        template = instruction_template(checkpoint, family.instruction)
        self.template = None if self.takes_pairs else template
        prompt = rerank_prompt_of(checkpoint) if self.takes_pairs else None
        self.is_prompted = prompt is not None
        self.pairs = (
            TemplatePairs(self.tokenizer) if prompt is None else PromptedPairs(self.tokenizer, prompt)
        )
        self.truncation = context.options.truncation

    def run(self, batch: Sequence[StageRequest]) -> list[Answer | RequestError]:
        return [self._answer_timed(request) for request in batch]

    def _answer_timed(self, request: StageRequest) -> Answer | RequestError:
        begun = now_us()
        answer = self._answer(request)
        if isinstance(answer, RequestError):
            return answer
        return {**answer, TOKENIZER_TIMES: np.array([[begun, now_us()]], np.int64)}

    def _answer(self, request: StageRequest) -> Answer | RequestError:
        try:
            settings = TokenizerSettings.read(
                request.parameters,
                self.tokenizer.checkpoint,
                self.truncation,
                self.late,
                self.template,
                self.chat,
            )
            text = request.array(TEXT)
            is_pair = text.shape[1] == 2 and self.takes_pairs
            takes_instructions = self.template is not None or self.chat is not None
            if settings.instruction is not None and not (self.is_prompted if is_pair else takes_instructions):
                raise RequestError(
                    ErrorCode.INVALID_INSTRUCTION,
                    "this model was not made for instructions; leave instruction out"
                    + ("" if is_pair else ", or put a text of your own before every input with prompt"),
                )
            if is_pair:
                return self._answer_rows(self.pairs.encode(text.tolist(), settings))
            if text.shape[1] != 1:
                shapes = "[n, 1] or, for pairs, [n, 2]" if self.takes_pairs else "[n, 1], one text each"
                raise RequestError(
                    ErrorCode.INVALID_INPUT, f"text has shape {list(text.shape)}; this model takes {shapes}"
                )
            items = text[:, 0].tolist()
            if request.wanted & _DESCRIPTION:
                return self._describe(items, settings, request)
            if DECODED in request.wanted:
                return self._decode(items, request)
            if self.contents is not None:
                grids = request.optional_array(IMAGE_GRID)
                rows = self.contents.encode(items, grids, settings)
                return {**self._answer_rows(rows), **self._answer_grids(grids)}
            return self._answer_rows(self.tokenizer.encode(items, settings))
        except RequestError as error:
            return error

    def _answer_rows(self, rows: Sequence[Tokens]) -> Answer:
        length = np.array([len(row.ids) for row in rows], np.int32)
        return {
            INPUT_IDS: np.concatenate([row.ids for row in rows])[None],
            LENGTH: length[None],
            PROMPT_LENGTH: np.array([[row.prompt_length for row in rows]], np.int32),
            KEY_LENGTH: np.array([[len(row.ids) - row.n_blind for row in rows]], np.int32),
            FIRST_LENGTH: np.array([[row.first_length for row in rows]], np.int32),
            N_TOKENS: np.array([[row.count] for row in rows], np.int32),
            TRUNCATED: np.array([[row.is_truncated] for row in rows]),
        }

    def _answer_grids(self, grids: npt.NDArray[Any] | None) -> Answer:
        """What the encoder reads of images; without images it is empty, and so are the patches, which else
        come from the image stage.
        """
        present = np.zeros((0, 3), np.int32) if grids is None else grids[grids[:, :, 0] > 0]
        return {GRID: present[None], PATCHES: np.zeros((1, 0, self.patch_width), np.uint8)}

    def _describe(self, items: list[bytes], settings: TokenizerSettings, request: StageRequest) -> Answer:
        # A prompt that nobody asked for would be taken for the text's own tokens.
        if not _PROMPTING.intersection(request.parameters):
            settings = replace(settings, prompt="")
        is_added = _read_flag(request.parameters, RequestParameter.ADD_SPECIAL_TOKENS)
        rows = self.tokenizer.describe(items, settings, add_special_tokens=is_added)
        texts = [piece.encode() for row in rows for piece in row.texts]
        spans = np.array([span for row in rows for span in row.spans], np.int32)
        return {
            INPUT_IDS: np.array([[token for row in rows for token in row.ids]], np.int32),
            TOKEN_TEXTS: np.array([texts], np.object_),
            TOKEN_SPANS: spans.reshape(1, -1, 2),
            IS_SPECIAL: np.array([[is_special for row in rows for is_special in row.is_special]], np.bool_),
            N_TOKENS: np.array([[len(row.ids)] for row in rows], np.int32),
        }

    def _decode(self, items: list[bytes], request: StageRequest) -> Answer:
        is_skipped = _read_flag(request.parameters, RequestParameter.SKIP_SPECIAL_TOKENS)
        texts = self.tokenizer.decode(items, skip_special_tokens=is_skipped)
        return {DECODED: np.array([[text.encode()] for text in texts], np.object_)}


def _read_flag(parameters: dict[str, Any], name: str) -> bool:
    """A boolean parameter, true where it is absent. Raises RequestError."""
    value = parameters.get(name, True)
    if not isinstance(value, bool):
        raise RequestError(ErrorCode.INVALID_INPUT, f"{name} is {value!r}; it takes true or false")
    return value
