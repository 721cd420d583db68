"""The lists of inputs that requests hold: texts, token ids, and items with images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, WithJsonSchema, model_validator

from backends.contract import ErrorCode
from gateway.contents import Draft, check_parts, read_draft, read_messages
from gateway.drafts import Drafts
from gateway.errors import ADVICE, BadRequest, EmptyInput
from gateway.inputs import TextFields, kind_of
from gateway.settings import Settings
from gateway.tasks import Items

_LISTS: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "array", "items": {"type": "string"}},
    {"type": "array", "items": {"type": "integer"}},
    {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
]
# Checked by read_drafts: a validator that tries four kinds of list in turn takes seconds for a large one.
Texts = Annotated[
    Any,
    WithJsonSchema(
        {
            "description": "A text, a list of texts, a list of token ids, or a list of such lists.",
            "anyOf": _LISTS,
        }
    ),
]
_IMAGE = {"type": "string", "description": "A data URL, base64, or where the server allows it a URL."}
_ITEM = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "image": {"anyOf": [_IMAGE, {"type": "array", "items": _IMAGE}]},
        "content": {
            "description": "One item of several content parts, in OpenAI's form.",
            "type": "array",
            "items": {"type": "object"},
        },
    },
}
Inputs = Annotated[
    Any,
    WithJsonSchema(
        {
            "description": "A text, a list of texts, a list of token ids, or a list of these. For a model "
            'that takes images an item may also be {"image": ...}, {"text": ..., "image": ...}, or a message '
            "of content parts.",
            "anyOf": [*_LISTS, _ITEM, {"type": "array", "items": {"anyOf": [{"type": "string"}, _ITEM]}}],
        }
    ),
]
_MESSAGES = {
    "description": "vLLM's other form of one item: a user message, and before it maybe a system message, "
    "which is the instruction.",
    "type": "array",
    "items": {"type": "object"},
}


class InputFields(TextFields):
    """What requests say that embed one list of inputs."""

    input: Inputs = None
    messages: Annotated[Any, WithJsonSchema(_MESSAGES)] = None
    modality: Literal["text", "image"] | None = Field(
        None, description="infinity's word for what strings of `input` are; image makes them references."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_infinity(cls, content: Any) -> Any:
        """infinity's clients send 0 where they want all dimensions, and always a modality."""
        is_its = isinstance(content, dict) and content.get("modality") and content.get("dimensions") == 0
        return {**content, "dimensions": None} if is_its else content


Body = TypeVar("Body", bound=InputFields)


def read_inputs(body: Body, settings: Settings) -> tuple[Drafts, Body]:
    """The inputs of a request, and the request in the words of one without `messages`. Raises BadRequest."""
    if body.messages is None:
        if "input" not in body.model_fields_set:
            raise BadRequest("the field input is missing", param="input")
        is_image = body.modality == "image"
        return read_drafts(body.input, settings, strings_are_images=is_image), body
    if body.input is not None:
        raise BadRequest("input and messages are two forms of one thing; give one", param="messages")
    draft, instruction = read_messages(body.messages)
    if instruction and (body.instruction or body.instruct):
        raise BadRequest(
            "the system message is the instruction, and instruction is there too; give one", param="messages"
        )
    drafts = _drafts([draft], "messages")
    return drafts, body.model_copy(update={"instruction": body.instruction or instruction})


def read_items(value: Any, settings: Settings, field: str) -> Items:
    """The same as read_drafts, of what takes texts only. Raises BadRequest."""
    drafts = read_drafts(value, settings, field)
    for draft in drafts.with_images.values():
        raise BadRequest(
            f"{draft.field} holds an image; texts only are taken here, and images at /v1/embeddings",
            param=field,
        )
    return drafts.items


def read_drafts(
    value: Any, settings: Settings, field: str = "input", *, strings_are_images: bool = False
) -> Drafts:
    """The forms that inputs come in: an item, items, token ids, lists of token ids. Strings are texts, or
    with `strings_are_images` references to images.

    Raises BadRequest, which names the item at fault.
    """
    if isinstance(value, (str, dict)):
        value = [value]
    if not isinstance(value, list):
        raise BadRequest(
            f"{field} is {kind_of(value)}; it takes a string, a list of strings, or lists of token ids",
            param=field,
        )
    if not value:
        raise EmptyInput(f"{field} is an empty list; send at least one item", param=field)
    if _is_id(value[0]):
        for i, token in enumerate(value):
            if not _is_id(token):
                raise BadRequest(
                    f"{field}[{i}] is {kind_of(token)}; after a token id, every item must be one", param=field
                )
        value = [value]
    if len(value) > settings.max_items:
        raise BadRequest(
            f"{field} has {len(value)} items; at most {settings.max_items} can be sent in one request",
            param=field,
        )
    if isinstance(value[0], (str, dict)):
        check_parts(value, field)
        read = (
            read_draft(item, f"{field}[{i}]", strings_are_images=strings_are_images)
            for i, item in enumerate(value)
        )
        return _drafts(read, field)
    if strings_are_images:
        raise BadRequest(f"{field} takes images here, and {field}[0] is {kind_of(value[0])}", param=field)
    return Drafts(_id_rows(value, settings.max_token_ids, field), {}, field)


def _drafts(read: Iterable[Draft], field: str) -> Drafts:
    texts = []
    with_images = {}
    for i, draft in enumerate(read):
        if not draft.text and not draft.images:
            raise EmptyInput(
                f"{draft.field} is an empty string; leave it out, or send some text", param=field
            )
        texts.append(draft.text)
        if draft.images:
            with_images[i] = draft
    return Drafts(Items.of_texts(texts), with_images, field)


def _id_rows(value: list[Any], max_token_ids: int, field: str) -> Items:
    for i, row in enumerate(value):
        if not isinstance(row, list):
            raise BadRequest(
                f"{field}[{i}] is {kind_of(row)}; items are strings, or lists of token ids", param=field
            )
        if not row:
            raise EmptyInput(
                f"{field}[{i}] is an empty list; leave it out, or send some token ids", param=field
            )
    count = sum(map(len, value))
    if count > max_token_ids:
        raise BadRequest(
            f"{field} has {count} token ids; at most {max_token_ids} can be sent in one request", param=field
        )
    for i, row in enumerate(value):
        for token in row:
            if not _is_id(token):
                raise BadRequest(
                    f"{field}[{i}] holds {kind_of(token)}; a list of token ids holds whole numbers only",
                    param=field,
                )
            if not 0 <= token < 2**31:
                raise BadRequest(
                    f"{field}[{i}]: {token} is no token id of any model; "
                    f"{ADVICE[ErrorCode.INVALID_TOKEN_ID]}",
                    param=field,
                    code=ErrorCode.INVALID_TOKEN_ID,
                )
    return Items.of_ids(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
