"""Where an instruction stands before a query: by the checkpoint's own prompts, or by its family's habit."""

from __future__ import annotations

import re

from backends.checkpoint import Checkpoint

# What published prompts look like, around the instruction that they hold.
_PATTERNS = (
    # E5-Mistral, gte-Qwen2, Qwen3-Embedding, multilingual-e5-large-instruct, bge-en-icl
    re.compile(r"(?P<before>Instruct: ?|<instruct>)(?P<task>[^\n]+)(?P<behind>\n.*)", re.DOTALL),
    # EmbeddingGemma
    re.compile(r"(?P<before>task: )(?P<task>[^|]+)(?P<behind> \| query: ?)"),
)


def instruction_template(checkpoint: Checkpoint, habit: str | None) -> str | None:
    """What stands before a query with an instruction, {} in its place; None for a model that takes none.

    `habit` is the family's own, for a checkpoint that has no prompt for queries to go by.
    """
    own = checkpoint.role_prompts.get("query")
    for prompt in ([own] if own else []) + list(checkpoint.prompts.values()):
        for pattern in _PATTERNS:
            found = pattern.fullmatch(prompt)
            if found:
                before, behind = (_escape(found[name]) for name in ("before", "behind"))
                return f"{before}{{}}{behind}"
    return None if own else habit


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
