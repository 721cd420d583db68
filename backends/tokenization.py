"""Turns texts into token ids as the checkpoint's own tokenizer.json says, with prompts and truncation.

Truncation keeps special tokens and is cheap: of a text that is far over the limit only so many characters
are tokenised as the limit can hold. The kept tokens are those of the whole text, unless it has no blank for
so long that the cut falls into a word which still counts; of a pair of which both texts are far over the
limit one token more or less may go to either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from tokenizers import Encoding

from backends.chat_prompt import ChatPrompt
from backends.checkpoint import Checkpoint
from backends.contract import MAX_CHARS_PER_TOKEN, TOKEN_DTYPE, ErrorCode
from backends.errors import CheckpointError, RequestError
from backends.late_interaction import LateInteraction
from backends.tokenizer_file import (
    TokenIds,
    expansion_id,
    keep_whole,
    load_tokenizer,
    special_tokens,
)
from backends.tokenizer_settings import TokenizerSettings

# Characters that are tokenised at first for each token of the limit. English has 4 to 5, so one try is enough
# for nearly every text; the window grows where a text is denser than that (long runs of blanks, unbroken
# strings).
_WINDOW_CHARS_PER_TOKEN = 16
_WINDOW_GROWTH = 4


@dataclass(frozen=True)
class Tokens:
    """One item, special tokens included."""

    ids: TokenIds
    prompt_length: int = 0
    """Tokens at the beginning that belong to the prompt, the leading special token included."""
    is_truncated: bool = False
    n_blind: int = 0
    """Tokens at the end that the others do not look at."""
    n_second: int = 0
    """Tokens at the end that belong to the second text of a pair."""
    computed: int | None = None
    """Tokens that the model computes, where that is another number than that of the ids."""

    @property
    def count(self) -> int:
        """What a client is told."""
        return len(self.ids) if self.computed is None else self.computed

    @property
    def first_length(self) -> int:
        """Tokens that belong to the first text, or to the only one."""
        return len(self.ids) - self.n_second


@dataclass(frozen=True)
class Description:
    """One text's tokens, as a person looks at them."""

    ids: list[int]
    texts: list[str]
    spans: list[tuple[int, int]]
    """Characters of the text, from and to; (0, 0) for special tokens."""
    is_special: list[bool]


class TextTokenizer:
    """The tokenizer of one checkpoint. Safe to use from one thread at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_length: int,
        late: LateInteraction | None = None,
        most_tokens: int | None = None,
        last_token: str | None = None,
        chat: ChatPrompt | None = None,
    ) -> None:
        """`max_length` bounds a text, and `most_tokens` one whose role has a length of its own; `last_token`
        belongs behind every text although the tokenizer's files do not say so. What stands behind the items
        of a `chat` takes the place of special tokens.
        """
        self.checkpoint = checkpoint
        self.max_length = max_length
        self.most_tokens = max_length if most_tokens is None else most_tokens
        self.late = late
        self.tokenizer = load_tokenizer(checkpoint)
        if late is not None:
            keep_whole(self.tokenizer, late.marks)
        known = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.vocab_size = min(known, int(checkpoint.language_config.get("vocab_size") or known))
        self.prefix, self.suffix = special_tokens(self.tokenizer, checkpoint, last_token)
        if chat is not None:
            behind = self.tokenizer.encode(chat.behind, add_special_tokens=False).ids
            self.prefix, self.suffix = np.empty(0, np.int32), np.array(behind, np.int32)
        self.expansion = late.expansion if late is not None else None
        if self.expansion is not None:
            self.expansion_id = expansion_id(self.tokenizer, checkpoint, self.expansion)
        if self._room(None) < 1:
            raise CheckpointError(
                f"max_length is {max_length}, which special tokens fill; give at least "
                f"{max_length + 1 - self._room(None)}"
            )
        self.prompt_ids = lru_cache(maxsize=256)(self._encode_prompt)
        self.repeated = lru_cache(maxsize=64)(self._encode_text)

    def limit(self, role: str | None) -> int:
        """Tokens of one text, special tokens included."""
        if self.late is None or role is None:
            return self.max_length
        own = self.late.lengths.get(role, self.max_length)
        if role == "query" and self.expansion is not None:
            own = self.expansion.length if self.expansion.is_fixed else max(own, self.expansion.length)
        return min(own, self.most_tokens)

    def _room(self, role: str | None) -> int:
        return self.limit(role) - len(self.prefix) - len(self.suffix)

    def encode(self, items: Sequence[bytes], settings: TokenizerSettings) -> list[Tokens]:
        """Items of one request -> tokens of each.

        Raises RequestError, which names the first item at fault.
        """
        self.check_prompt(settings)
        if settings.has_ids:
            return [self._from_ids(i, item, settings) for i, item in enumerate(items)]
        texts = [decode_text(i, item) for i, item in enumerate(items)]
        rows = self.encode_texts([settings.prompt + text for text in texts], settings)
        return [self.wrap(i, *row, settings) for i, row in enumerate(rows)]

    def check_prompt(self, settings: TokenizerSettings) -> None:
        """A prompt is never truncated: without its end it would be another one."""
        prompt, room = settings.prompt, self._room(settings.role)
        is_too_long = len(prompt) > room * MAX_CHARS_PER_TOKEN
        if is_too_long or (prompt and len(self.prompt_ids(prompt)) >= room):
            raise RequestError(
                ErrorCode.INVALID_INSTRUCTION if settings.instruction else ErrorCode.INVALID_PROMPT,
                f"the prompt of {len(prompt)} characters leaves no room for a text: this model takes "
                f"{self.limit(settings.role)} tokens in all",
            )

    def encode_texts(self, texts: list[str], settings: TokenizerSettings) -> list[tuple[TokenIds, int]]:
        """(ids without special tokens, number of characters that were not looked at) of each text."""
        room = self._room(settings.role)
        window = room * _WINDOW_CHARS_PER_TOKEN
        limit = room * MAX_CHARS_PER_TOKEN
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
                if unread and len(encoding.ids) <= room and window < limit:
                    unfinished.append(i)
            waiting = unfinished
            window = min(window * _WINDOW_GROWTH, limit)
        return rows

    def bare(self, texts: list[str], truncation: str) -> list[tuple[TokenIds, int]]:
        """(ids without special tokens, number of characters that were not looked at) of each text."""
        return self.encode_texts(texts, TokenizerSettings(truncation=truncation))

    def _encode_text(self, text: str, truncation: str) -> tuple[TokenIds, int]:
        """One text, as bare() has it."""
        return self.bare([text], truncation)[0]

    def cut(self, text: str, count: int, side: str) -> str:
        """The first tokens of a text, `count` of them, as text; of the side "left" the last ones."""
        size = count * _WINDOW_CHARS_PER_TOKEN
        while True:
            piece = _window(text, size, side)
            spans = self.tokenizer.encode(piece, add_special_tokens=False).offsets
            if len(spans) > count:
                return piece[spans[-count][0] :] if side == "left" else piece[: spans[count - 1][1]]
            if len(piece) == len(text):
                return text
            size *= _WINDOW_GROWTH

    def _from_ids(self, index: int, item: bytes, settings: TokenizerSettings) -> Tokens:
        ids = self._without_special_tokens(self._read_ids(index, item, self.vocab_size))
        prompt = np.array(self.prompt_ids(settings.prompt), np.int32)
        # Ids that come from here hold a late interaction model's mark already.
        has_mark = self.late is not None and ids[: len(prompt)].tolist() == prompt.tolist()
        return self.wrap(index, ids if has_mark else np.concatenate([prompt, ids]), 0, settings)

    def _read_ids(self, index: int, item: bytes, vocab_size: int) -> TokenIds:
        if len(item) % TOKEN_DTYPE.itemsize:
            raise RequestError(
                ErrorCode.INVALID_INPUT, f"token ids take 4 bytes each; there are {len(item)} bytes", index
            )
        ids = np.frombuffer(item, TOKEN_DTYPE).astype(np.int32)
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if outside.size:
            raise RequestError(
                ErrorCode.INVALID_TOKEN_ID,
                f"token id {outside[0]} is not in this model's vocabulary of {vocab_size} tokens; "
                "ids of another model's tokenizer cannot be used here, send the text instead",
                index,
            )
        return ids

    def describe(
        self, items: Sequence[bytes], settings: TokenizerSettings, *, add_special_tokens: bool
    ) -> list[Description]:
        """The tokens of texts, or of ids, without any limit of the model. Raises RequestError."""
        if settings.has_ids:
            # A model may have more ids than its tokenizer has tokens: its sparse vectors name those, too.
            size = max(self.vocab_size, int(self.checkpoint.language_config.get("vocab_size") or 0))
            rows = [self._read_ids(i, item, size).tolist() for i, item in enumerate(items)]
            return [Description(ids, [self._piece(i) for i in ids], [(0, 0)] * len(ids), []) for ids in rows]
        texts = [settings.prompt + decode_text(i, item) for i, item in enumerate(items)]
        for i, text in enumerate(texts):
            if len(text) > self.max_length * MAX_CHARS_PER_TOKEN:
                raise RequestError(
                    ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                    f"the text has {len(text)} characters; at most {self.max_length * MAX_CHARS_PER_TOKEN} "
                    "are looked at here",
                    i,
                )
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [
            self._describe_text(text, encoding, add_special_tokens)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _describe_text(self, text: str, encoding: Encoding, add_special_tokens: bool) -> Description:
        before = self.prefix.tolist() if add_special_tokens else []
        behind = self.suffix.tolist() if add_special_tokens else []
        special = [self.tokenizer.id_to_token(token) or "" for token in (*before, *behind)]
        pieces = [text[start:stop] for start, stop in encoding.offsets]
        return Description(
            [*before, *encoding.ids, *behind],
            [*special[: len(before)], *pieces, *special[len(before) :]],
            [(0, 0)] * len(before) + list(encoding.offsets) + [(0, 0)] * len(behind),
            [True] * len(before) + [False] * len(pieces) + [True] * len(behind),
        )

    def decode(self, items: Sequence[bytes], *, skip_special_tokens: bool) -> list[str]:
        """Lists of token ids -> text. Raises RequestError."""
        rows = [self._read_ids(i, item, self.vocab_size).tolist() for i, item in enumerate(items)]
        return self.tokenizer.decode_batch(rows, skip_special_tokens=skip_special_tokens)

    def _piece(self, token: int) -> str:
        """What one id alone decodes to; the number itself for one that the tokenizer does not know."""
        if self.tokenizer.id_to_token(token) is None:
            return str(token)
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def _without_special_tokens(self, ids: TokenIds) -> TokenIds:
        """Clients send ids with or without the model's special tokens, which are put on once."""
        before, behind = len(self.prefix), len(self.suffix)
        if before and ids[:before].tolist() == self.prefix.tolist():
            ids = ids[before:]
        if behind and ids[-behind:].tolist() == self.suffix.tolist():
            ids = ids[:-behind]
        return ids

    def wrap(
        self,
        index: int,
        ids: TokenIds,
        unread: int,
        settings: TokenizerSettings,
        kept: Sequence[int] | None = None,
    ) -> Tokens:
        """Truncates, and puts the special tokens on. `unread` characters of the text have no ids.

        `kept` are the ids at the beginning that are never cut off; None is the prompt. Raises RequestError.
        """
        prompt = self.prompt_ids(settings.prompt) if settings.prompt else ()
        room = self._room(settings.role)
        if settings.max_tokens is not None:
            room = max(1, min(room, settings.max_tokens - len(self.prefix) - len(self.suffix)))
        is_over = unread > 0 or len(ids) > room
        if is_over and settings.truncation == "error":
            raise RequestError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the text has {self._describe(ids, unread, room)}, and "
                f"{self._describe_limit(settings)}; shorten it or let it be truncated",
                index,
            )
        if is_over and settings.truncation == "left":
            # The prompt stays: without it the rest would be read as another kind of text.
            kept = prompt[: room - 1] if kept is None else kept[:room]
            ids = np.concatenate([np.array(kept, np.int32), ids[len(ids) - room + len(kept) :]])
        whole = np.concatenate([self.prefix, ids[:room], self.suffix])
        if not len(whole):
            raise RequestError(
                ErrorCode.INVALID_INPUT, "the text has no tokens at all; send some letters", index
            )
        prompt_length = min(len(self.prefix) + len(prompt), len(whole)) if prompt else 0
        if self.expansion is None or settings.role != "query":
            return Tokens(whole, prompt_length, is_over)
        added = max(0, min(self.expansion.length, self.most_tokens) - len(whole))
        expanded = np.concatenate([whole, np.full(added, self.expansion_id, np.int32)])
        return Tokens(expanded, prompt_length, is_over, 0 if self.expansion.attends else added)

    def _describe_limit(self, settings: TokenizerSettings) -> str:
        own = self.limit(settings.role)
        if settings.max_tokens is not None and settings.max_tokens < own:
            return f"max_tokens is {settings.max_tokens}"
        return f"this model takes {own} tokens" + ("" if own == self.max_length else f" of a {settings.role}")

    def _describe(self, ids: TokenIds, unread: int, room: int) -> str:
        length = len(ids) + len(self.prefix) + len(self.suffix)
        if not unread:
            return f"{length} tokens"
        if len(ids) > room:
            return f"more than {length} tokens"
        return f"more than {MAX_CHARS_PER_TOKEN} characters for each token that fits"

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


def decode_text(index: int, item: bytes) -> str:
    """UTF-8 -> text. Raises RequestError with the item's place."""
    try:
        return item.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(ErrorCode.INVALID_INPUT, f"the text is not UTF-8: {error}", index) from None
