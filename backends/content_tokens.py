"""Turns items that hold images, beside a text or alone, into token ids.

What stands for the images is never cut, nor taken for a part of the text: a text that spells such a token is
refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.chat_prompt import ChatPrompt
from backends.contract import ErrorCode
from backends.errors import RequestError
from backends.families.base import ImageTokens
from backends.tokenization import TextTokenizer, Tokens, decode_text
from backends.tokenizer_file import TokenIds
from backends.tokenizer_settings import TokenizerSettings

Grids = npt.NDArray[np.int32]
"""[n, k, 3]: patches of the images of each item; zeros where there is none."""


class ContentTokenizer:
    """The tokenizer of a model of texts and images. Safe to use from one thread at a time."""

    def __init__(self, tokenizer: TextTokenizer, images: ImageTokens, chat: ChatPrompt | None) -> None:
        self.tokenizer = tokenizer
        self.images = images
        self.chat = chat

    def encode(
        self, items: Sequence[bytes], grids: Grids | None, settings: TokenizerSettings
    ) -> list[Tokens]:
        """Items of one request -> tokens of each; without `grids` all are texts.

        Raises RequestError, which names the first item at fault.
        """
        if grids is None:
            rows = self.tokenizer.encode(self._filled(items), settings)
            for i, row in enumerate(rows):
                self._check_spelled(i, row.ids)
            return rows
        if settings.has_ids:
            raise RequestError(ErrorCode.INVALID_INPUT, "an item with an image takes a text, not token ids")
        if len(grids) != len(items):
            raise RequestError(
                ErrorCode.INVALID_INPUT,
                f"there are {len(items)} items in text and {len(grids)} in image; send as many of both",
            )
        self.tokenizer.check_prompt(settings)
        return self._encode(items, [_present(row) for row in grids], settings)

    def _filled(self, items: Sequence[bytes]) -> list[bytes]:
        nothing = self.chat.nothing.encode() if self.chat is not None else b""
        return [item or nothing for item in items]

    def _encode(
        self, items: Sequence[bytes], images: Sequence[Sequence[Any]], settings: TokenizerSettings
    ) -> list[Tokens]:
        # Behind an image the text is tokenised on its own: a special token stands between it and the prompt.
        words = settings.prompt[len(settings.opening) :]
        texts = []
        for i, (item, own) in enumerate(zip(items, images, strict=True)):
            text = decode_text(i, item)
            if not own and not text:
                raise RequestError(
                    ErrorCode.INVALID_INPUT, "the item has neither a text nor an image; send one of them", i
                )
            if own and self.images.is_item and (text or len(own) > 1):
                raise RequestError(
                    ErrorCode.INVALID_INPUT,
                    "this model embeds a text or an image, and the item has more; send an item for each of "
                    "them",
                    i,
                )
            texts.append((words if own else settings.prompt) + text if not self._stands_alone(own) else "")
        rows = self.tokenizer.encode_texts(texts, settings)
        return [
            self._join(i, ids, unread, own, settings)
            for i, ((ids, unread), own) in enumerate(zip(rows, images, strict=True))
        ]

    def _stands_alone(self, own: Sequence[Any]) -> bool:
        return bool(own) and self.images.is_item

    def _join(
        self, index: int, ids: TokenIds, unread: int, own: Sequence[Any], settings: TokenizerSettings
    ) -> Tokens:
        self._check_spelled(index, ids)
        if not own:
            return self.tokenizer.wrap(index, ids, unread, settings)
        if self.images.is_item:
            (grid,) = own
            return Tokens(np.array(self.images.ids(grid), np.int32), computed=self.images.computed(grid))
        seen = [token for grid in own for token in self.images.ids(grid)]
        opening = self.tokenizer.prompt_ids(settings.opening) if settings.opening else ()
        self._check_spelled(index, np.array(opening, np.int32))
        head = [*opening, *seen]
        limit = self.tokenizer.limit(settings.role)
        count = len(head) + len(self.tokenizer.prefix) + len(self.tokenizer.suffix)
        if count > min(limit, settings.max_tokens or limit):
            capped = settings.max_tokens is not None and settings.max_tokens < limit
            raise RequestError(
                ErrorCode.IMAGES_TOO_LONG,
                f"the item's images take {len(seen)} tokens, {count} with the prompt, and "
                + (f"max_tokens is {settings.max_tokens}" if capped else f"this model takes {limit}")
                + "; send fewer or smaller images",
                index,
            )
        return self.tokenizer.wrap(
            index, np.concatenate([np.array(head, np.int32), ids]), unread, settings, head
        )

    def _check_spelled(self, index: int, ids: TokenIds) -> None:
        """Raises RequestError where a text holds a token that stands for an image."""
        for token in self.images.reserved:
            if (ids == token).any():
                text = self.tokenizer.tokenizer.id_to_token(token)
                raise RequestError(
                    ErrorCode.INVALID_INPUT,
                    f"the text holds {text}, which stands for an image or a film in this model; leave it "
                    "out, and send the image itself",
                    index,
                )


def _present(row: Any) -> list[list[int]]:
    """The grids of the images that are there."""
    return [grid for grid in row.tolist() if grid[0]]
