"""A checkpoint's chat template, as far as a reranker's pair of a query and a document goes into it.

The template is rendered once, around marks, and taken apart at them: a request then costs no rendering. What
comes of it is compared with another rendering, and a template that does more to the texts than put them
somewhere is refused.

*Source:* transformers 5.23 utils/chat_template_utils.py for the environment; sentence-transformers 6.2
base/modules/transformer.py for the roles `query` and `document` and for the instruction as system message.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.sandbox

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError

# Characters that no template holds, nor changes.
_MARKS = {"instruction": "\ue000\ue001", "query": "\ue000\ue002", "document": "\ue000\ue003"}
_PROBES = {"instruction": "Weigh it", "query": "what is it?", "document": "It is\na thing."}


@dataclass(frozen=True)
class PairTemplate:
    """Format strings with {query} and {document}, and {instruction} in the second."""

    plain: str
    instructed: str | None
    """None where the template has no place for an instruction."""


def read_pair_template(checkpoint: Checkpoint) -> PairTemplate | None:
    """The checkpoint's template for pairs; None where it has none that knows the two roles.

    Raises CheckpointError for one that cannot be rendered, or that changes the texts.
    """
    source = _source(checkpoint)
    if source is None or "document" not in source or "query" not in source:
        return None
    where = f"the chat template of {checkpoint.transformer_path}"
    try:
        render = _renderer(checkpoint, source)
        plain = _take_apart(render, where, ("query", "document"))
        instructed = _take_apart(render, where, ("instruction", "query", "document"))
    except jinja2.TemplateError as error:
        raise CheckpointError(f"{where} cannot be rendered with a query and a document: {error}") from error
    if plain is None:
        raise CheckpointError(f"{where} leaves the query or the document out")
    return PairTemplate(plain, instructed)


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


Renderer = Callable[[dict[str, str]], str]
"""Texts by role -> the prompt."""


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
    roles = {"instruction": "system", "query": "query", "document": "document"}

    def render(texts: dict[str, str]) -> str:
        messages: list[dict[str, Any]] = [
            {"role": roles[name], "content": text} for name, text in texts.items()
        ]
        rendered = template.render(messages=messages, add_generation_prompt=False, **special)
        if all(text in rendered for name, text in texts.items() if name != "instruction"):
            return rendered
        # Some templates want the content in parts.
        for message in messages:
            message["content"] = [{"type": "text", "text": message["content"]}]
        return template.render(messages=messages, add_generation_prompt=False, **special)

    return render


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _take_apart(render: Renderer, where: str, names: tuple[str, ...]) -> str | None:
    """The rendering as a format string; None where one of the texts is not in it."""
    marks = {name: _MARKS[name] for name in names}
    rendered = render(marks)
    if any(mark not in rendered for mark in marks.values()):
        return None
    made = rendered.replace("{", "{{").replace("}", "}}")
    for name, mark in marks.items():
        made = made.replace(mark, f"{{{name}}}")
    probes = {name: _PROBES[name] for name in names}
    if made.format(**probes) != render(probes):
        raise CheckpointError(f"{where} changes the texts of a pair, which is not served")
    return made
