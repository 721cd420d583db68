"""Turns texts into token ids as the checkpoint's own tokenizer.json says, with prompts and truncation.

Truncation keeps special tokens and is cheap: of a text that is far over the limit only so many characters
are tokenised as the limit can hold. The kept tokens are those of the whole text, unless it has no blank for
so long that the cut falls into a word which still counts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase, Normalizer
from tokenizers.normalizers import Sequence as NormalizerSequence

from backends.checkpoint import Checkpoint
from backends.contract import TOKEN_DTYPE, TRUNCATIONS, ErrorCode, RequestParameter
from backends.errors import CheckpointError, RequestError

logger = logging.getLogger(__name__)

TokenIds = npt.NDArray[np.int32]

# Characters that are tokenised at first for each token of the limit. English has 4 to 5, so one try is enough
# for nearly every text; the window grows where a text is denser than that (long runs of blanks, unbroken
# strings).
_WINDOW_CHARS_PER_TOKEN = 16
_WINDOW_GROWTH = 4
# A text with more characters than this for each token of the limit is over the limit, whatever they are: an
# unbroken string of any length can be one token of some vocabularies.
_MAX_CHARS_PER_TOKEN = 256


@dataclass(frozen=True)
class Tokens:
    """One item, special tokens included."""

    ids: TokenIds
    prompt_length: int = 0
    """Tokens at the beginning that belong to the prompt, the leading special token included."""
    is_truncated: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """What one request asks of the tokenizer."""

    prompt: str = ""
    truncation: str = "error"
    has_ids: bool = False

    @classmethod
    def read(
        cls, parameters: Mapping[str, Any], checkpoint: Checkpoint, truncation: str
    ) -> TokenizerSettings:
        """From request parameters, over the checkpoint's defaults. Raises RequestError."""
        wanted = parameters.get(RequestParameter.TRUNCATION, truncation)
        if wanted not in TRUNCATIONS:
            raise RequestError(
                ErrorCode.INVALID_INPUT, f"truncation is {wanted!r}; it takes one of {', '.join(TRUNCATIONS)}"
            )
        text_format = parameters.get(RequestParameter.TEXT_FORMAT, "text")
        if text_format not in ("text", "ids"):
            raise RequestError(
                ErrorCode.INVALID_INPUT, f"text_format is {text_format!r}; it takes text or ids"
            )
        return cls(_prompt(parameters, checkpoint), wanted, text_format == "ids")


def _prompt(parameters: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    literal = parameters.get(RequestParameter.PROMPT)
    if literal is not None:
        if not isinstance(literal, str):
            raise RequestError(ErrorCode.INVALID_PROMPT, f"prompt is {literal!r}; it takes a string")
        return literal
    name = parameters.get(RequestParameter.PROMPT_NAME, checkpoint.default_prompt_name)
    if name is None:
        return ""
    if name not in checkpoint.prompts:
        known = ", ".join(repr(p) for p in checkpoint.prompts) or "none"
        raise RequestError(
            ErrorCode.UNKNOWN_PROMPT,
            f"prompt_name is {name!r}, which this model does not have; its prompts: {known}. "
            "A prompt of your own goes into the parameter prompt",
        )
    return checkpoint.prompts[name]


class TextTokenizer:
    """The tokenizer of one checkpoint. Safe to use from one thread at a time."""

    def __init__(self, checkpoint: Checkpoint, max_length: int) -> None:
        self.checkpoint = checkpoint
        self.max_length = max_length
        self.tokenizer = _load(checkpoint)
        known = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.vocab_size = min(known, int(checkpoint.config.get("vocab_size") or known))
        self.prefix, self.suffix = _special_tokens(self.tokenizer, checkpoint)
        self.room = max_length - len(self.prefix) - len(self.suffix)
        if self.room < 1:
            raise CheckpointError(
                f"max_length is {max_length}, which special tokens fill; give at least "
                f"{max_length + 1 - self.room}"
            )
        self._prompt_ids = lru_cache(maxsize=256)(self._encode_prompt)

    def encode(self, items: Sequence[bytes], settings: TokenizerSettings) -> list[Tokens]:
        """Items of one request -> tokens of each.

        Raises RequestError, which names the first item at fault.
        """
        self._check_prompt(settings.prompt)
        if settings.has_ids:
            return [self._from_ids(i, item, settings) for i, item in enumerate(items)]
        texts = [_decode(i, item) for i, item in enumerate(items)]
        rows = self._encode_texts([settings.prompt + text for text in texts], settings)
        return [self._wrap(i, *row, settings) for i, row in enumerate(rows)]

    def _check_prompt(self, prompt: str) -> None:
        """A prompt is never truncated: without its end it would be another one."""
        is_too_long = len(prompt) > self.room * _MAX_CHARS_PER_TOKEN
        if is_too_long or (prompt and len(self._prompt_ids(prompt)) >= self.room):
            raise RequestError(
                ErrorCode.INVALID_PROMPT,
                f"the prompt of {len(prompt)} characters leaves no room for a text: this model takes "
                f"{self.max_length} tokens in all",
            )

    def _encode_texts(self, texts: list[str], settings: TokenizerSettings) -> list[tuple[TokenIds, int]]:
        """(ids without special tokens, number of characters that were not looked at) of each text."""
        window = self.room * _WINDOW_CHARS_PER_TOKEN
        limit = self.room * _MAX_CHARS_PER_TOKEN
        rows: list[tuple[TokenIds, int]] = [(np.empty(0, np.int32), 0)] * len(texts)
        waiting = list(range(len(texts)))
        while waiting:
            pieces = [_window(texts[i], window, settings.truncation) for i in waiting]
            unfinished = []
            for i, piece, encoding in zip(
                waiting,
                pieces,
                self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False),
                strict=True,
            ):
                unread = len(texts[i]) - len(piece)
                rows[i] = (np.array(encoding.ids, np.int32), unread)
                if unread and len(encoding.ids) <= self.room and window < limit:
                    unfinished.append(i)
            waiting = unfinished
            window = min(window * _WINDOW_GROWTH, limit)
        return rows

    def _from_ids(self, index: int, item: bytes, settings: TokenizerSettings) -> Tokens:
        if len(item) % TOKEN_DTYPE.itemsize:
            raise RequestError(
                ErrorCode.INVALID_INPUT, f"token ids take 4 bytes each; there are {len(item)} bytes", index
            )
        ids = np.frombuffer(item, TOKEN_DTYPE).astype(np.int32)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise RequestError(
                ErrorCode.INVALID_TOKEN_ID,
                f"token id {outside[0]} is not in this model's vocabulary of {self.vocab_size} tokens; "
                "ids of another model's tokenizer cannot be used here, send the text instead",
                index,
            )
        ids = self._without_special_tokens(ids)
        prompt = np.array(self._prompt_ids(settings.prompt), np.int32)
        return self._wrap(index, np.concatenate([prompt, ids]), 0, settings)

    def _without_special_tokens(self, ids: TokenIds) -> TokenIds:
        """Clients send ids with or without the model's special tokens, which are put on once."""
        before, behind = len(self.prefix), len(self.suffix)
        if before and ids[:before].tolist() == self.prefix.tolist():
            ids = ids[before:]
        if behind and ids[-behind:].tolist() == self.suffix.tolist():
            ids = ids[:-behind]
        return ids

    def _wrap(self, index: int, ids: TokenIds, unread: int, settings: TokenizerSettings) -> Tokens:
        """Truncates, and puts the special tokens on. `unread` characters of the text have no ids."""
        prompt = self._prompt_ids(settings.prompt) if settings.prompt else ()
        is_over = unread > 0 or len(ids) > self.room
        if is_over and settings.truncation == "error":
            raise RequestError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the text has {self._describe(ids, unread)}, and this model takes {self.max_length} tokens; "
                "shorten it or let it be truncated",
                index,
            )
        if is_over and settings.truncation == "left":
            # The prompt stays: without it the rest would be read as another kind of text.
            kept = prompt[: self.room - 1]
            ids = np.concatenate([np.array(kept, np.int32), ids[len(ids) - self.room + len(kept) :]])
        whole = np.concatenate([self.prefix, ids[: self.room], self.suffix])
        if not len(whole):
            raise RequestError(
                ErrorCode.INVALID_INPUT, "the text has no tokens at all; send some letters", index
            )
        prompt_length = len(self.prefix) + len(prompt) if prompt else 0
        return Tokens(whole, min(prompt_length, len(whole)), is_over)

    def _describe(self, ids: TokenIds, unread: int) -> str:
        length = len(ids) + len(self.prefix) + len(self.suffix)
        if not unread:
            return f"{length} tokens"
        if len(ids) > self.room:
            return f"more than {length} tokens"
        return f"more than {_MAX_CHARS_PER_TOKEN} characters for each token that fits"

    def _encode_prompt(self, prompt: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(prompt, add_special_tokens=False).ids)


def _window(text: str, chars: int, truncation: str) -> str:
    """The part of a text that truncation keeps, cut at a blank where there is one so that no word is
    split.
    """
    if len(text) <= chars:
        return text
    if truncation == "left":
        blank = text.find(" ", len(text) - chars, len(text) - chars // 2)
        return text[blank + 1 :] if blank >= 0 else text[-chars:]
    blank = text.rfind(" ", chars // 2, chars)
    return text[:blank] if blank >= 0 else text[:chars]


def _decode(index: int, item: bytes) -> str:
    try:
        return item.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(ErrorCode.INVALID_INPUT, f"the text is not UTF-8: {error}", index) from None


def _load(checkpoint: Checkpoint) -> Tokenizer:
    file = checkpoint.transformer_path / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing more exact
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    else:
        # Imported here: it takes a second, and nearly every checkpoint has the file.
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.transformer_path, local_files_only=True
        ).backend_tokenizer
    # Some published files carry the padding and truncation of their training.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if checkpoint.lowercases and not (tokenizer.normalizer and _has_lowercase(_state(tokenizer.normalizer))):
        rest = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
        tokenizer.normalizer = NormalizerSequence([Lowercase(), *rest])
    return tokenizer


def _state(normalizer: Normalizer) -> dict[str, Any]:
    """A normaliser as it stands in tokenizer.json."""
    state: dict[str, Any] = json.loads(normalizer.__getstate__())
    return state


def _has_lowercase(state: Mapping[str, Any]) -> bool:
    inner = state.get("normalizers", [])
    return state.get("type") == "Lowercase" or bool(state.get("lowercase")) or any(map(_has_lowercase, inner))


def _special_tokens(tokenizer: Tokenizer, checkpoint: Checkpoint) -> tuple[TokenIds, TokenIds]:
    """What stands before and behind a text.

    The post-processor of tokenizer.json says so, but not always the whole of it: add_bos_token and
    add_eos_token of tokenizer_config.json count too (E5-Mistral and gte-Qwen2 lose their last token
    otherwise), and a BERT tokenizer without a post-processor has [CLS] and [SEP] all the same. *Source:*
    transformers 5.23's BertTokenizer.
    """
    prefix, suffix = _template_tokens(tokenizer, checkpoint)
    config = checkpoint.tokenizer_config

    def id_of(name: str) -> int | None:
        token = config.get(name)
        return (
            tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
        )

    first, last = id_of("bos_token"), id_of("eos_token")
    if config.get("add_bos_token") and first is not None and prefix[:1] != [first]:
        prefix = [first, *prefix]
    if config.get("add_eos_token") and last is not None and suffix[-1:] != [last]:
        suffix = [*suffix, last]
    if not prefix and not suffix and tokenizer.post_processor is None and _is_wordpiece(tokenizer):
        cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
        if cls is not None and sep is not None:
            prefix, suffix = [cls], [sep]
    return np.array(prefix, np.int32), np.array(suffix, np.int32)


def _is_wordpiece(tokenizer: Tokenizer) -> bool:
    return type(tokenizer.model).__name__ == "WordPiece"


def _template_tokens(tokenizer: Tokenizer, checkpoint: Checkpoint) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and behind a text."""
    probe = "a"
    bare = tokenizer.encode(probe, add_special_tokens=False).ids
    whole = tokenizer.encode(probe, add_special_tokens=True).ids
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise CheckpointError(
        f"{checkpoint.transformer_path}/tokenizer.json: its post-processor changes the text's own tokens, "
        f"which is not served ({json.dumps(bare)} became {json.dumps(whole)})"
    )
