"""A checkpoint's chat template, as far as a reranker's pair of a query and a document goes into it.

The template is rendered once, around marks, and taken apart at them: a request then costs no rendering. What
comes of it is compared with another rendering, and a template that does more to the texts than put them
somewhere, or take the blanks off around them, is refused.

*Source:* transformers 5.23 utils/chat_template_utils.py for the environment; sentence-transformers 6.2
base/modules/transformer.py for the roles `query` and `document`, for the instruction as system message and
for the arguments in sentence_bert_config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.sandbox

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError
from backends.prompt_pieces import Part, Piece, Slot

# Characters that no template holds, nor changes.
_MARKS = {Slot.INSTRUCTION: "\ue000\ue001", Slot.QUERY: "\ue000\ue002", Slot.DOCUMENT: "\ue000\ue003"}
# With blanks around them that stand in no template by themselves.
_PROBES = {
    Slot.INSTRUCTION: "\t Weigh it {now} \t",
    Slot.QUERY: "\t what is it?\n\t",
    Slot.DOCUMENT: "\t\nIt is {query}\na thing. \t",
}
_ROLES = {Slot.INSTRUCTION: "system", Slot.QUERY: "query", Slot.DOCUMENT: "document"}
# Arguments of apply_chat_template that are about tokens, not about the text.
_OTHER_ARGUMENTS = ("restore_suffix", "truncation", "max_length", "padding", "tokenize", "return_tensors")


def read_pair_template(checkpoint: Checkpoint) -> tuple[Piece, Piece | None] | None:
    """The checkpoint's template for pairs, without an instruction and with one (None where it has no place
    for that); None where it has no template that knows the two roles.

    Raises CheckpointError for one that cannot be rendered, or that changes the texts.
    """
    source = _source(checkpoint)
    if source is None or not all(re.search(f"['\"]{role}['\"]", source) for role in ("query", "document")):
        return None
    where = f"the chat template of {checkpoint.transformer_path}"
    try:
        render = _renderer(checkpoint, source)
        plain = _take_apart(render, where, (Slot.QUERY, Slot.DOCUMENT))
        instructed = _take_apart(render, where, (Slot.INSTRUCTION, Slot.QUERY, Slot.DOCUMENT))
    except CheckpointError:
        raise
    except Exception as error:  # it is anybody's code, which may fail in any way
        raise CheckpointError(f"{where} cannot be rendered with a query and a document: {error}") from error
    return None if plain is None else (plain, instructed)


def _source(checkpoint: Checkpoint) -> str | None:
    file = checkpoint.transformer_path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    declared = checkpoint.tokenizer_config.get("chat_template")
    if isinstance(declared, list):
        # Several with names; the default is the one that is used when nobody asks for another.
        named = {str(entry.get("name")): entry.get("template") for entry in declared}
        declared = named.get("default")
    return declared if isinstance(declared, str) else None


Renderer = Callable[[Mapping[Slot, str]], str]
"""Texts by slot -> the prompt."""


def _renderer(checkpoint: Checkpoint, source: str) -> Renderer:
    # In a sandbox: the template comes with the checkpoint.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise
    template = environment.from_string(source)
    special = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in checkpoint.tokenizer_config.items()
        if name.endswith("_token") and isinstance(value, (str, dict))
    }
    declared = (checkpoint.transformer_config.get("processing_kwargs") or {}).get("chat_template") or {}
    arguments = {name: value for name, value in declared.items() if name not in _OTHER_ARGUMENTS}

    def render(texts: Mapping[Slot, str]) -> str:
        messages: list[dict[str, Any]] = [
            {"role": _ROLES[slot], "content": text} for slot, text in texts.items()
        ]
        given = {"add_generation_prompt": False, **special, **arguments}
        rendered = template.render(messages=messages, **given)
        if all(texts[slot].strip() in rendered for slot in (Slot.QUERY, Slot.DOCUMENT)):
            return rendered
        # Some templates want the content in parts.
        for message in messages:
            message["content"] = [{"type": "text", "text": message["content"]}]
        return template.render(messages=messages, **given)

    return render


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _take_apart(render: Renderer, where: str, slots: tuple[Slot, ...]) -> Piece | None:
    """The rendering with slots; None where one of the texts is not in it."""
    rendered = render({slot: _MARKS[slot] for slot in slots})
    if any(_MARKS[slot] not in rendered for slot in slots):
        return None
    by_mark = {_MARKS[slot]: slot for slot in slots}
    parts: list[Part] = [
        by_mark.get(part, part) for part in re.split(f"({'|'.join(map(re.escape, by_mark))})", rendered)
    ]
    probes = {slot: _PROBES[slot] for slot in slots}
    expected = render(probes)
    piece = Piece(tuple(part for part in parts if part != ""))
    stripped = frozenset(slot for slot in slots if _PROBES[slot] not in expected)
    for strips in (frozenset(), stripped, frozenset(slots)):
        tried = Piece(piece.parts, strips)
        if tried.fill(probes) == expected:
            return tried
    raise CheckpointError(f"{where} changes the texts of a pair, which is not served")
