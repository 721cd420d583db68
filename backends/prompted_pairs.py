"""Turns pairs of a query and a document into the token ids of a question to a language model.

Where a pair is over the limit the document gives way, and of a query what takes more than three quarters of
the room beside the prompt and is not left over by the document; what the prompt says always stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backends.contract import ErrorCode
from backends.errors import OptionError, RequestError
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
    around: int
    """Tokens of the prompt with its instruction, without query and document."""
    tail: TokenIds
    """Tokens of what stands behind the document in its own piece."""

    @property
    def room(self) -> int:
        """Tokens that query and document may have."""
        return self.limit - self.around


class PromptedPairs:
    """The prompt of one checkpoint. Safe to use from one thread at a time."""

    def __init__(self, tokenizer: TextTokenizer, prompt: RerankPrompt) -> None:
        """Raises OptionError for a limit that the prompt alone fills."""
        self.tokenizer = tokenizer
        self.prompt = prompt
        try:
            self._frame(TokenizerSettings())
        except RequestError as error:
            raise OptionError(f"max_length is {tokenizer.max_length}: {error.failure.message}") from error

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
        given = {Slot.INSTRUCTION: instruction, Slot.QUERY: "", Slot.DOCUMENT: ""}
        rows = [self.tokenizer.repeated(piece.fill(given), "right") for piece in pieces]
        around = sum(len(ids) for ids, _ in rows)
        tail = self._ids(next(p for p in pieces if p.has(Slot.DOCUMENT)).behind_document())
        frame = _Frame(pieces, instruction, limit, around, tail)
        if frame.room < 2 or any(unread for _, unread in rows):
            more = "more than " if any(unread for _, unread in rows) else ""
            raise RequestError(
                ErrorCode.INVALID_INSTRUCTION if settings.instruction else ErrorCode.INVALID_INPUT,
                f"the prompt around a pair takes {more}{around} tokens of {limit}, which leaves no room "
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
        side = "left" if settings.truncation == "left" else "right"
        query, document = (
            text if cap is None else self.tokenizer.cut(text, cap, side)
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
                f"the pair has {'more than ' if is_unread else ''}{count} tokens with the prompt around it, "
                f"and this model takes {frame.limit} tokens; shorten it or let it be truncated",
                index,
            )
        if is_over:
            row = self._shorten(frame, pair, settings.truncation)
        return Tokens(np.concatenate([ids for ids, _ in row]), is_truncated=is_over or is_capped)

    def _shorten(self, frame: _Frame, pair: tuple[str, str], truncation: str) -> Row:
        """The row of a pair that is over the limit, with less of its texts."""
        query, document = pair
        n_document = len(self.tokenizer.bare([document], "right")[0][0])
        most = max(1, frame.room * 3 // 4, frame.room - n_document)
        query = self.tokenizer.cut(query, most, "right")
        if truncation == "left":
            # The document's end stays; what stands around it takes its place first.
            (around,) = self._tokenize(frame, [(query, "")])
            room = max(1, frame.limit - sum(len(ids) for ids, _ in around))
            document = self.tokenizer.cut(document, room, "left")
        (row,) = self._tokenize(frame, [(query, document)])
        place = next(i for i, piece in enumerate(frame.pieces) if piece.has(Slot.DOCUMENT))
        others = sum(len(ids) for i, (ids, _) in enumerate(row) if i != place)
        ids, unread = row[place]
        kept = max(0, frame.limit - others - len(frame.tail))
        row[place] = (np.concatenate([_without(ids, frame.tail)[:kept], frame.tail]), unread)
        return row


def _without(ids: TokenIds, tail: TokenIds) -> TokenIds:
    """Without what stands behind the document, where that is still there."""
    return ids[: len(ids) - len(tail)] if len(tail) and ids[-len(tail) :].tolist() == tail.tolist() else ids
