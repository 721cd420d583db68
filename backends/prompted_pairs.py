"""Turns pairs of a query and a document into the token ids of a question to a language model.

Only the document gives way where a pair is over the limit, and a query that takes more than three quarters of
it; what the prompt says before and behind them always stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backends.contract import ErrorCode
from backends.errors import RequestError
from backends.rerank_prompt import RerankPrompt
from backends.tokenization import TextTokenizer, Tokens, decode_text
from backends.tokenizer_file import TokenIds
from backends.tokenizer_settings import TokenizerSettings

_QUERY, _DOCUMENT = "{query}", "{document}"


class PromptedPairs:
    """The prompt of one checkpoint. Safe to use from one thread at a time."""

    def __init__(self, tokenizer: TextTokenizer, prompt: RerankPrompt) -> None:
        self.tokenizer = tokenizer
        self.prompt = prompt

    def encode(self, items: Sequence[tuple[bytes, bytes]], settings: TokenizerSettings) -> list[Tokens]:
        """Pairs of one request -> tokens of each.

        Raises RequestError, which names the first pair at fault.
        """
        if settings.has_ids:
            raise RequestError(ErrorCode.INVALID_INPUT, "a pair takes texts, not token ids")
        if settings.instruction is not None and self.prompt.instructed is None:
            raise RequestError(
                ErrorCode.INVALID_INSTRUCTION,
                "this model's prompt has no place for an instruction; leave instruction out",
            )
        limit = min(self.tokenizer.max_length, settings.max_tokens or self.tokenizer.max_length)
        pieces = self.prompt.pieces(settings.instruction)
        fixed = sum(len(self._fixed(piece)) for piece in pieces if not _has_slots(piece))
        tail = self._fixed(next(p for p in pieces if _DOCUMENT in p).partition(_DOCUMENT)[2])
        if limit - fixed - len(tail) < 2:
            raise RequestError(
                ErrorCode.INVALID_INSTRUCTION if settings.instruction else ErrorCode.INVALID_INPUT,
                f"the prompt around a pair takes {fixed + len(tail)} tokens of {limit}, which leaves no room "
                "for a query and a document",
            )
        texts = [(decode_text(i, a), decode_text(i, b)) for i, (a, b) in enumerate(items)]
        shortened = [self._shorten(query, document, settings) for query, document in texts]
        pairs = [(query, document) for query, document, _ in shortened]
        rows = self._tokenize(pieces, pairs)
        if settings.truncation == "left":
            self._cut_beginnings(pieces, pairs, rows, limit)
        return [
            self._join(i, pieces, own, limit, fixed, tail, settings, is_capped=is_capped)
            for i, (own, (*_, is_capped)) in enumerate(zip(rows, shortened, strict=True))
        ]

    def _fixed(self, text: str) -> TokenIds:
        """Tokens of what every request has; a special token written out is one."""
        return self.tokenizer.repeated(text, "right")[0] if text else np.empty(0, np.int32)

    def _tokenize(
        self, pieces: Sequence[str], pairs: Sequence[tuple[str, str]]
    ) -> list[list[tuple[TokenIds, int]]]:
        """Of every pair each piece's ids, and the number of characters that have none."""
        filled = [
            [piece.format(query=query, document=document) if _has_slots(piece) else piece for piece in pieces]
            for query, document in pairs
        ]
        # Without the document a piece is the same for all pairs of a request, and for the next request.
        known = {
            text: self.tokenizer.repeated(text, "right")
            for row in filled
            for text, piece in zip(row, pieces, strict=True)
            if _DOCUMENT not in piece
        }
        single = [text for text in dict.fromkeys(text for row in filled for text in row) if text not in known]
        known.update(zip(single, self.tokenizer.bare(single, "right"), strict=True))
        return [[known[text] for text in row] for row in filled]

    def _shorten(self, query: str, document: str, settings: TokenizerSettings) -> tuple[str, str, bool]:
        """Both texts as far as the caps of the request let them stand, and whether anything was cut off."""
        a = self._cap(query, settings.max_query_tokens)
        b = self._cap(document, settings.max_document_tokens)
        return a, b, len(a) < len(query) or len(b) < len(document)

    def _cap(self, text: str, count: int | None) -> str:
        return text if count is None else self.tokenizer.cut(text, count, "right")

    def _cut_beginnings(
        self,
        pieces: Sequence[str],
        pairs: Sequence[tuple[str, str]],
        rows: list[list[tuple[TokenIds, int]]],
        limit: int,
    ) -> None:
        """Leaves of documents over the limit the last tokens that fit, and one more so that it still
        shows.
        """
        for i, (query, document) in enumerate(pairs):
            if sum(len(ids) for ids, _ in rows[i]) <= limit and not any(unread for _, unread in rows[i]):
                continue
            around = self._tokenize(pieces, [(query, "")])[0]
            room = max(1, limit - sum(len(ids) for ids, _ in around))
            rest = self.tokenizer.cut(document, room, "left")
            ((*row,),) = self._tokenize(pieces, [(query, rest)])
            place = next(j for j, piece in enumerate(pieces) if _DOCUMENT in piece)
            # Marked as not wholly read, which it is not.
            row[place] = (row[place][0], max(1, len(document) - len(rest)))
            rows[i] = row

    def _join(
        self,
        index: int,
        pieces: Sequence[str],
        rows: Sequence[tuple[TokenIds, int]],
        limit: int,
        fixed: int,
        tail: TokenIds,
        settings: TokenizerSettings,
        *,
        is_capped: bool,
    ) -> Tokens:
        count = sum(len(ids) for ids, _ in rows)
        is_unread = any(unread for _, unread in rows)
        is_over = is_unread or count > limit
        if is_over and settings.truncation == "error":
            raise RequestError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the pair has {'more than ' if is_unread else ''}{count} tokens with the prompt "
                "around it, and "
                f"this model takes {limit} tokens; shorten it or let it be truncated",
                index,
            )
        parts = [ids for ids, _ in rows]
        if is_over:
            room = limit - fixed
            for i, piece in enumerate(pieces):
                if _DOCUMENT in piece:
                    kept = room - len(tail)
                    parts[i] = np.concatenate([_cut(parts[i], tail)[:kept], tail])
                elif _QUERY in piece:
                    # As FlagEmbedding's rerankers do.
                    parts[i] = parts[i][: (room - len(tail)) * 3 // 4]
                    room -= len(parts[i])
        return Tokens(np.concatenate(parts), is_truncated=is_over or is_capped)


def _cut(ids: TokenIds, tail: TokenIds) -> TokenIds:
    """Without what stands behind the document, where that is still there."""
    return ids[: len(ids) - len(tail)] if len(tail) and ids[-len(tail) :].tolist() == tail.tolist() else ids


def _has_slots(piece: str) -> bool:
    return _QUERY in piece or _DOCUMENT in piece
