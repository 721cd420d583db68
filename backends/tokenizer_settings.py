"""What one request asks of the tokenizer, read from its parameters over the checkpoint's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backends.chat_prompt import ChatPrompt
from backends.checkpoint import Checkpoint
from backends.contract import ROLES, TRUNCATIONS, ErrorCode, RequestParameter
from backends.errors import RequestError
from backends.late_interaction import LateInteraction


@dataclass(frozen=True)
class TokenizerSettings:
    """What one request asks of the tokenizer."""

    prompt: str = ""
    opening: str = ""
    """What of the prompt stands before the user's own words, images among them."""
    instruction: str | None = None
    """What a query is for."""
    truncation: str = "error"
    has_ids: bool = False
    role: str | None = None
    """query or document, for a model that tells them apart."""
    max_tokens: int | None = None
    max_query_tokens: int | None = None
    max_document_tokens: int | None = None

    @classmethod
    def read(
        cls,
        parameters: Mapping[str, Any],
        checkpoint: Checkpoint,
        truncation: str,
        late: LateInteraction | None = None,
        template: str | None = None,
        chat: ChatPrompt | None = None,
    ) -> TokenizerSettings:
        """From request parameters, over the checkpoint's defaults. Raises RequestError.

        `template` is what stands before a query with an instruction, {} in its place; `chat` what stands
        around every item.
        """
        wanted = parameters.get(RequestParameter.TRUNCATION, truncation)
        if wanted not in TRUNCATIONS:
            raise RequestError(
                ErrorCode.INVALID_INPUT, f"truncation is {wanted!r}; it takes one of {', '.join(TRUNCATIONS)}"
            )
        text_format = parameters.get(RequestParameter.TEXT_FORMAT, "text")
        if text_format not in ("text", "ids"):
            raise RequestError(
                ErrorCode.INVALID_INPUT, f"text_format is {text_format!r}; it takes text or ids"
            )
        role = read_role(parameters)
        if late is not None and late.has_roles:
            # *Source:* sentence-transformers takes a text without a role for a document.
            role = role or "document"
            prompts = late.prompts
        else:
            prompts = checkpoint.role_prompts
        named = {**checkpoint.prompts, **prompts}
        of_role = prompts.get(role) if role else None
        instruction = _instruction(parameters)
        caps = [_read_cap(parameters, name) for name in _CAPS]
        if chat is not None:
            usual = named.get(checkpoint.default_prompt_name or "")
            opening, words = _open(parameters, role, instruction, chat, named, usual)
            return cls(opening + words, opening, instruction, wanted, text_format == "ids", role, *caps)
        if instruction is not None and template is not None:
            prompt = _instruct(parameters, role, instruction, template)
        else:
            if template is not None:
                # Of a model with instructions but without prompts of its own queries and documents go bare.
                named = {"query": "", "document": "", **named}
            prompt = _prompt(parameters, named, of_role, checkpoint.default_prompt_name)
        return cls(prompt, "", instruction, wanted, text_format == "ids", role, *caps)


_CAPS = (RequestParameter.MAX_TOKENS, RequestParameter.MAX_QUERY_TOKENS, RequestParameter.MAX_DOCUMENT_TOKENS)


def _read_cap(parameters: Mapping[str, Any], name: str) -> int | None:
    value = parameters.get(name)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_number and value >= 1):
        raise RequestError(
            ErrorCode.INVALID_INPUT, f"{name} is {value!r}; it takes a whole number of at least 1"
        )
    return value


def read_role(parameters: Mapping[str, Any]) -> str | None:
    """The request's role. Raises RequestError for one that does not exist."""
    role: str | None = parameters.get(RequestParameter.ROLE)
    if role is not None and role not in ROLES:
        raise RequestError(ErrorCode.INVALID_INPUT, f"role is {role!r}; it takes one of {', '.join(ROLES)}")
    return role


def _instruction(parameters: Mapping[str, Any]) -> str | None:
    instruction = parameters.get(RequestParameter.INSTRUCTION)
    if instruction is None:
        return None
    if not isinstance(instruction, str) or not instruction.strip():
        raise RequestError(
            ErrorCode.INVALID_INSTRUCTION,
            f"instruction is {instruction!r}; it takes some words, such as a task",
        )
    return instruction.strip()


def _instruct(parameters: Mapping[str, Any], role: str | None, instruction: str, template: str) -> str:
    """The prompt that an instruction makes."""
    name = parameters.get(RequestParameter.PROMPT_NAME, "query")
    if role == "document" or name == "document":
        raise RequestError(
            ErrorCode.INVALID_INSTRUCTION,
            "an instruction is for queries, and documents of this model have none; leave instruction out",
        )
    if RequestParameter.PROMPT in parameters or name != "query":
        other = RequestParameter.PROMPT if RequestParameter.PROMPT in parameters else f"prompt_name {name!r}"
        raise RequestError(
            ErrorCode.INVALID_INSTRUCTION,
            f"instruction and {other} both say what stands before the text; give one",
        )
    return template.format(instruction)


def _open(
    parameters: Mapping[str, Any],
    role: str | None,
    instruction: str | None,
    chat: ChatPrompt,
    prompts: Mapping[str, str],
    usual: str | None,
) -> tuple[str, str]:
    """What a chat begins with, and the words that a request puts before the user's; the checkpoint's own
    prompts are instructions there.
    """
    literal = parameters.get(RequestParameter.PROMPT)
    name = parameters.get(RequestParameter.PROMPT_NAME)
    if instruction is not None and (role == "document" or name is not None):
        other = "input_type document" if role == "document" else f"prompt_name {name!r}"
        raise RequestError(
            ErrorCode.INVALID_INSTRUCTION,
            f"instruction and {other} both say what the instruction is; give one",
        )
    if literal is not None and not isinstance(literal, str):
        raise RequestError(ErrorCode.INVALID_PROMPT, f"prompt is {literal!r}; it takes a string")
    if name is not None:
        own = {"query": "", "document": "", **prompts}
        instruction = _prompt({RequestParameter.PROMPT_NAME: name}, own, None, None) or None
    elif instruction is None and role is not None:
        instruction = prompts.get(role) or usual or None
    elif instruction is None:
        instruction = usual or None
    return chat.opening(instruction), literal or ""


def _prompt(
    parameters: Mapping[str, Any], prompts: Mapping[str, str], of_role: str | None, default_name: str | None
) -> str:
    literal = parameters.get(RequestParameter.PROMPT)
    if literal is not None:
        if not isinstance(literal, str):
            raise RequestError(ErrorCode.INVALID_PROMPT, f"prompt is {literal!r}; it takes a string")
        return literal
    name = parameters.get(RequestParameter.PROMPT_NAME)
    if name is None and of_role is not None:
        return of_role
    name = name or default_name
    if name is None:
        return ""
    if name not in prompts:
        known = ", ".join(repr(p) for p in prompts) or "none"
        raise RequestError(
            ErrorCode.UNKNOWN_PROMPT,
            f"prompt_name is {name!r}, which this model does not have; its prompts: {known}. A prompt of "
            "your own goes into the parameter prompt",
        )
    return prompts[name]
