"""Prompts with slots: pieces of text that are tokenised each on its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Slot(Enum):
    """What a request puts into a prompt."""

    INSTRUCTION = "instruction"
    QUERY = "query"
    DOCUMENT = "document"


Part = str | Slot
_SLOT = re.compile("{(" + "|".join(slot.value for slot in Slot) + ")}")


@dataclass(frozen=True)
class Piece:
    """Literal texts and slots, end to end."""

    parts: tuple[Part, ...]
    strips: frozenset[Slot] = frozenset()
    """Slots of which the blanks around a text are left out."""

    @classmethod
    def of(cls, text: str) -> Piece:
        """Of a text in which {query}, {document} and {instruction} are slots."""
        found = _SLOT.split(text)
        # Literals and the names of slots take turns.
        parts: list[Part] = [Slot(part) if i % 2 else part for i, part in enumerate(found)]
        return cls(tuple(part for part in parts if part != ""))

    def has(self, slot: Slot) -> bool:
        """Whether the slot is in it."""
        return slot in self.parts

    def fill(self, texts: Mapping[Slot, str]) -> str:
        """The text of a piece all of whose slots are given."""
        return "".join(part if isinstance(part, str) else self._text(part, texts) for part in self.parts)

    def _text(self, slot: Slot, texts: Mapping[Slot, str]) -> str:
        return texts[slot].strip() if slot in self.strips else texts[slot]

    def behind_document(self) -> str:
        """The literal text that ends it."""
        place = self.parts.index(Slot.DOCUMENT)
        return "".join(part for part in self.parts[place + 1 :] if isinstance(part, str))
