"""Turns pairs of texts into token ids by the tokenizer's own template, as encoders take them.

*Source:* tokenizers 0.23 truncate_encodings; FlagEmbedding 1.4.2 where only the document is to be cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from backends.contract import ErrorCode
from backends.errors import RequestError
from backends.tokenization import TextTokenizer, Tokens, decode_text
from backends.tokenizer_file import TokenIds, pair_template
from backends.tokenizer_settings import TokenizerSettings


class TemplatePairs:
    """The template of one checkpoint. Safe to use from one thread at a time."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.template = pair_template(
            tokenizer.tokenizer, tokenizer.checkpoint, tokenizer.prefix, tokenizer.suffix
        )

    def encode(self, items: Sequence[tuple[bytes, bytes]], settings: TokenizerSettings) -> list[Tokens]:
        """Pairs of one request -> tokens of each; a text that is there often is tokenised once.

        Raises RequestError, which names the first pair at fault.
        """
        if self.template is None:
            raise RequestError(ErrorCode.INVALID_INPUT, "this model's tokenizer has no template for pairs")
        if settings.has_ids:
            raise RequestError(ErrorCode.INVALID_INPUT, "a pair takes texts, not token ids")
        counts = Counter(item for pair in items for item in pair)
        texts = {item: decode_text(i, item) for i, pair in enumerate(items) for item in pair}
        # A query that goes with many documents stands in many server requests, too.
        rows = {
            item: self.tokenizer.repeated(text, settings.truncation)
            for item, text in texts.items()
            if counts[item] > 1
        }
        single = [item for item in texts if counts[item] == 1]
        encoded = self.tokenizer.bare([texts[item] for item in single], settings.truncation)
        rows.update(zip(single, encoded, strict=True))
        joined = [(rows[first], rows[second]) for first, second in items]
        return [self._join(i, *pair, settings) for i, pair in enumerate(joined)]

    def _join(
        self,
        index: int,
        first: tuple[TokenIds, int],
        second: tuple[TokenIds, int],
        settings: TokenizerSettings,
    ) -> Tokens:
        """One pair; each text is its ids and the number of characters that have none."""
        assert self.template is not None
        limit = min(self.tokenizer.max_length, settings.max_tokens or self.tokenizer.max_length)
        room = limit - self.template.count
        if room < 2:
            raise RequestError(
                ErrorCode.INVALID_INPUT,
                f"max_tokens is {limit}, which leaves no room for a pair; give at least "
                f"{self.template.count + 2}",
            )
        side = _last if settings.truncation == "left" else _first
        a, b = first[0], second[0]
        if settings.max_query_tokens is not None:
            a = side(a, settings.max_query_tokens)
        if settings.max_document_tokens is not None:
            b = side(b, settings.max_document_tokens)
        # A cap that the request asks for cuts nothing that it does not want cut, but it does cut.
        is_capped = len(a) < len(first[0]) or len(b) < len(second[0])
        unread = (first[1] if len(a) == len(first[0]) else 0, second[1] if len(b) == len(second[0]) else 0)
        is_over = any(unread) or len(a) + len(b) > room
        if is_over and settings.truncation == "error":
            more = "more than " if any(unread) else ""
            raise RequestError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the pair has {more}{len(a) + len(b) + self.template.count} tokens, and this model takes "
                f"{limit} tokens; shorten it or let it be truncated",
                index,
            )
        if is_over:
            # Where a text is far over the limit its tokens are not all known, but about how many there are
            # is.
            known = (len(a) + unread[0], len(b) + unread[1])
            sizes = _pair_sizes(*known, room, limit, settings.truncation)
            a, b = side(a, sizes[0]), side(b, sizes[1])
        whole, n_second = self.template.join(a, b)
        return Tokens(whole, 0, is_over or is_capped, 0, n_second)


def _pair_sizes(first: int, second: int, room: int, limit: int, truncation: str) -> tuple[int, int]:
    """How many tokens of each text stay, of `room` in all, which is `limit` without special tokens.

    *Source:* tokenizers 0.23 truncate_encodings (longest_first); for `document` FlagEmbedding 1.4.2, which
    keeps three quarters of the limit for the query at most.
    """
    if truncation == "document":
        first = min(first, limit * 3 // 4)
        return first, min(second, room - first)
    shorter = min(first, second)
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room // 2 + room % 2
    return (longer, shorter) if first > second else (shorter, longer)


def _first(ids: TokenIds, count: int) -> TokenIds:
    """The first tokens."""
    return ids[:count]


def _last(ids: TokenIds, count: int) -> TokenIds:
    """The last tokens."""
    return ids[len(ids) - count :] if count < len(ids) else ids
