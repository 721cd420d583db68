"""Turns pairs of a query and a document into the token ids of a question to a language model.

Where a pair is over the limit the document gives way, and a query that takes more than three quarters of what
is left beside the prompt; what the prompt says always stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backends.contract import ErrorCode
from backends.errors import RequestError
from backends.prompt_pieces import Piece, Slot
from backends.rerank_prompt import RerankPrompt
from backends.tokenization import TextTokenizer, Tokens, decode_text
from backends.tokenizer_file import TokenIds
from backends.tokenizer_settings import TokenizerSettings

Row = list[tuple[TokenIds, int]]
"""Of each piece of one pair's prompt its ids, and the number of characters that have none."""


@dataclass(frozen=True)
class _Frame:
    """What a request's pairs have in common."""

    pieces: tuple[Piece, ...]
    instruction: str
    limit: int
    """Tokens of a pair with the prompt around it."""
    fixed: int
    """Tokens of the pieces that are the same for every pair."""
    tail: TokenIds
    """Tokens of what stands behind the document in its own piece."""

    @property
    def room(self) -> int:
        """Tokens that query and document may have, with what stands around them in their pieces."""
        return self.limit - self.fixed - len(self.tail)


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
        frame = self._frame(settings)
        pairs = [(decode_text(i, a), decode_text(i, b)) for i, (a, b) in enumerate(items)]
        capped = [self._cap(pair, settings) for pair in pairs]
        rows = self._tokenize(frame, capped)
        return [
            self._finish(i, frame, pair, row, settings, is_capped=pair != whole)
            for i, (whole, pair, row) in enumerate(zip(pairs, capped, rows, strict=True))
        ]

    def _frame(self, settings: TokenizerSettings) -> _Frame:
        if settings.instruction is not None and not self.prompt.takes_instruction:
            raise RequestError(
                ErrorCode.INVALID_INSTRUCTION,
                "this model's prompt has no place for an instruction; leave instruction out",
            )
        limit = min(self.tokenizer.max_length, settings.max_tokens or self.tokenizer.max_length)
        pieces, instruction = self.prompt.ask(settings.instruction)
        given = {Slot.INSTRUCTION: instruction}
        fixed = sum(len(self._ids(piece.fill(given))) for piece in pieces if piece.is_literal)
        tail = self._ids(next(p for p in pieces if p.has(Slot.DOCUMENT)).behind_document())
        frame = _Frame(pieces, instruction, limit, fixed, tail)
        if frame.room < 2:
            raise RequestError(
                ErrorCode.INVALID_INSTRUCTION if settings.instruction else ErrorCode.INVALID_INPUT,
                f"the prompt around a pair takes {fixed + len(tail)} tokens of {limit}, which leaves no room "
                "for a query and a document",
            )
        return frame

    def _ids(self, text: str) -> TokenIds:
        """Of what every request has; a special token written out is one."""
        return self.tokenizer.repeated(text, "right")[0] if text else np.empty(0, np.int32)

    def _tokenize(self, frame: _Frame, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        filled = []
        for query, document in pairs:
            texts = {Slot.INSTRUCTION: frame.instruction, Slot.QUERY: query, Slot.DOCUMENT: document}
            filled.append([piece.fill(texts) for piece in frame.pieces])
        # Without the document a piece is the same for all pairs of a request, and for the next request.
        known = {
            text: self.tokenizer.repeated(text, "right")
            for row in filled
            for text, piece in zip(row, frame.pieces, strict=True)
            if not piece.has(Slot.DOCUMENT)
        }
        single = [text for text in dict.fromkeys(text for row in filled for text in row) if text not in known]
        known.update(zip(single, self.tokenizer.bare(single, "right"), strict=True))
        return [[known[text] for text in row] for row in filled]

    def _cap(self, pair: tuple[str, str], settings: TokenizerSettings) -> tuple[str, str]:
        """Both texts as far as the caps of the request let them stand."""
        caps = settings.max_query_tokens, settings.max_document_tokens
        query, document = (
            text if cap is None else self.tokenizer.cut(text, cap, "right")
            for text, cap in zip(pair, caps, strict=True)
        )
        return query, document

    def _finish(
        self,
        index: int,
        frame: _Frame,
        pair: tuple[str, str],
        row: Row,
        settings: TokenizerSettings,
        *,
        is_capped: bool,
    ) -> Tokens:
        count = sum(len(ids) for ids, _ in row)
        is_unread = any(unread for _, unread in row)
        is_over = is_unread or count > frame.limit
        if is_over and settings.truncation == "error":
            raise RequestError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the pair has {'more than ' if is_unread else ''}{count} tokens with the prompt "
                "around it, and "
                f"this model takes {frame.limit} tokens; shorten it or let it be truncated",
                index,
            )
        if is_over:
            row = self._shorten(frame, pair, settings.truncation)
        return Tokens(np.concatenate([ids for ids, _ in row]), is_truncated=is_over or is_capped)

    def _shorten(self, frame: _Frame, pair: tuple[str, str], truncation: str) -> Row:
        """The row of a pair that is over the limit, with less of its texts."""
        query, document = self.tokenizer.cut(pair[0], max(1, frame.room * 3 // 4), "right"), pair[1]
        if truncation == "left":
            # The document's end stays; what stands around it takes its place first.
            (around,) = self._tokenize(frame, [(query, "")])
            room = max(1, frame.limit - sum(len(ids) for ids, _ in around))
            document = self.tokenizer.cut(document, room, "left")
        (row,) = self._tokenize(frame, [(query, document)])
        room = frame.room
        parts: Row = []
        for (ids, unread), piece in zip(row, frame.pieces, strict=True):
            if piece.has(Slot.DOCUMENT):
                others = sum(len(ids) for ids, _ in parts) - self._literal_before(frame, len(parts))
                ids = np.concatenate([_without(ids, frame.tail)[: room - others], frame.tail])
            elif piece.has(Slot.QUERY):
                # Its words around the query may make it a little longer than the query may be.
                ids = ids[: max(1, room - 1)]
            parts.append((ids, unread))
        return parts

    def _literal_before(self, frame: _Frame, count: int) -> int:
        """Tokens of the first pieces that are the same for every pair."""
        given = {Slot.INSTRUCTION: frame.instruction}
        return sum(len(self._ids(piece.fill(given))) for piece in frame.pieces[:count] if piece.is_literal)


def _without(ids: TokenIds, tail: TokenIds) -> TokenIds:
    """Without what stands behind the document, where that is still there."""
    return ids[: len(ids) - len(tail)] if len(tail) and ids[-len(tail) :].tolist() == tail.tolist() else ids
