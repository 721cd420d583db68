"""What stands around an item of a model that was trained on conversations: an instruction as the system's
turn, the item as the user's.

*Source:* gme_inference.py of Alibaba-NLP/gme-Qwen2-VL-2B-Instruct and SGLang's conversation template of that
name; the model card of Qwen/Qwen3-VL-Embedding-2B.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

GME = "gme-qwen2-vl"
QWEN3_VL = "qwen3-vl-embedding"


@dataclass(frozen=True)
class ChatPrompt:
    """Images stand before the text, and nothing between them."""

    name: str
    before: str
    """Up to the user's own words; {} is the instruction."""
    behind: str
    """From the end of the user's own words."""
    instruction: str
    """Where a request gives none."""
    ends_instructions: bool = False
    """Whether an instruction without a punctuation mark at its end gets a full stop."""
    nothing: str = ""
    """What stands for an item without text and images."""

    def opening(self, instruction: str | None) -> str:
        """All that stands before the user's own words."""
        text = (instruction or "").strip() or self.instruction
        if self.ends_instructions and not unicodedata.category(text[-1]).startswith("P"):
            text += "."
        return self.before.format(text)


CHAT_PROMPTS = {
    GME: ChatPrompt(
        name=GME,
        before="<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n",
        behind="<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
        instruction="You are a helpful assistant.",
    ),
    QWEN3_VL: ChatPrompt(
        name=QWEN3_VL,
        before="<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n",
        behind="<|im_end|>\n<|im_start|>assistant\n",
        instruction="Represent the user's input.",
        ends_instructions=True,
        nothing="NULL",
    ),
}
