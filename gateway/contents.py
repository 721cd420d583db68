"""One item of a request in the forms that clients write it: a text, images, or both.

*Source:* OpenAI's content parts; vLLM 0.13 and SGLang 0.5 for what else stands in one; infinity 0.0.78.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.errors import BadRequest, root_of
from gateway.inputs import kind_of

# The images of an item share the model's context with its text: so many of GME's largest fill two thirds of
# its 32768 tokens.
_MAX_IMAGES = 16
# Reading a part takes microseconds, and a body has room for a million.
_MAX_PARTS = 64
_MAX_PARTS_IN_ALL = 8192
_TYPES = frozenset({"text", "input_text", "image", "image_url", "input_image"})
_UNSERVED = {
    "video": "a video",
    "video_url": "a video",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
# What clients put beside an image or a message, and what changes nothing here.
_IGNORED = frozenset({"type", "detail", "uuid", "name"})


@dataclass(frozen=True)
class Reference:
    """An image as a client writes it."""

    value: str
    """An http(s) URL, a data URL, or base64."""
    field: str
    """What the client calls it, such as input[2].image."""


@dataclass(frozen=True)
class Draft:
    """An item whose images are not there yet. Neither a text nor an image may be in it."""

    text: str
    images: tuple[Reference, ...]
    field: str
    """What the client calls it, such as input[2]."""


def read_draft(item: Any, field: str, *, strings_are_images: bool = False) -> Draft:
    """A string, {"text": ..., "image": ...}, a content part, or {"content": ...} of one or several parts.

    Raises BadRequest, which names what is at fault.
    """
    draft = _read(item, field, strings_are_images=strings_are_images)
    if len(draft.images) > _MAX_IMAGES:
        raise BadRequest(
            f"{field} has {len(draft.images)} images; one item may have {_MAX_IMAGES}", param=root_of(field)
        )
    return draft


def check_parts(items: Sequence[Any], field: str) -> None:
    """Counts before anything is read. Raises BadRequest for lists of parts or images that are too long."""
    total = 0
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            continue
        for name, most in (("content", _MAX_PARTS), ("image", _MAX_IMAGES), ("image_url", _MAX_IMAGES)):
            held = item.get(name)
            count = len(held) if isinstance(held, list) else 0
            if count > most:
                what = "parts" if name == "content" else "images"
                raise BadRequest(f"{field}[{i}] has {count} {what}; one item may have {most}", param=field)
            total += count
    if total > _MAX_PARTS_IN_ALL:
        raise BadRequest(
            f"{field} has {total} parts and images in all; a request may have {_MAX_PARTS_IN_ALL}",
            param=field,
        )


def read_messages(messages: Any) -> tuple[Draft, str | None]:
    """A chat's one user message, and the system message before it, if there is one. Raises BadRequest.

    *Source:* vLLM 0.13, the chat form of its embeddings requests.
    """
    if not isinstance(messages, list):
        raise BadRequest(f"messages is {kind_of(messages)}; it takes a list of messages", param="messages")
    if len(messages) <= 2:
        check_parts(messages, "messages")
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if roles not in (["user"], ["system", "user"]):
        told = ", ".join(str(role)[:20] for role in roles[:4]) or "nobody"
        raise BadRequest(
            f"messages has {len(roles)} messages, of {told}; it makes one item: one message of the user, and "
            "before it, if you like, one of system, which is the instruction",
            param="messages",
        )
    draft = read_draft(messages[-1], f"messages[{len(messages) - 1}]")
    if len(messages) == 1:
        return draft, None
    system = read_draft({"content": messages[0].get("content")}, "messages[0]")
    if system.images:
        raise BadRequest("messages[0] holds an image; a system message is a text", param="messages")
    return draft, system.text


def _read(item: Any, field: str, *, strings_are_images: bool = False) -> Draft:
    if isinstance(item, str):
        return Draft("", (Reference(item, field),), field) if strings_are_images else Draft(item, (), field)
    if not isinstance(item, dict):
        raise BadRequest(
            f"{field} is {kind_of(item)}; after a text or an image, every item must be one of these",
            param=root_of(field),
        )
    _check_kind(item, field)
    held = {name: value for name, value in item.items() if value is not None and name not in _IGNORED}
    if "content" in held and set(held) <= {"content", "role"}:
        if held.get("role", "user") != "user":
            raise BadRequest(
                f"{field} has the role {str(held['role'])[:20]!r}; an item is a message of the user",
                param=root_of(field),
            )
        return _read_content(held["content"], field)
    if not held or not set(held) <= {"text", "image", "image_url"}:
        names = ", ".join(name[:40] for name in list(held)[:4]) or "nothing"
        raise BadRequest(
            f'{field} is an object that holds {names}; texts stand in {{"text": "..."}}, images in '
            '{"image": "..."}, and nothing else is read',
            param=root_of(field),
        )
    text = held.get("text", "")
    if not isinstance(text, str):
        raise BadRequest(f"{field}.text is {kind_of(text)}; it takes a string", param=root_of(field))
    return Draft(
        text,
        tuple(
            reference
            for name in ("image", "image_url")
            if name in held
            for reference in _references(held[name], f"{field}.{name}")
        ),
        field,
    )


def _check_kind(item: dict[str, Any], field: str) -> None:
    kind = item.get("type")
    names: Iterable[Any] = [kind, *(name for name, value in item.items() if value is not None)]
    for name in names:
        if isinstance(name, str) and name in _UNSERVED:
            raise BadRequest(
                f"{field} holds {_UNSERVED[name]} ({name}); texts and images are served", param=root_of(field)
            )
    if kind is not None and (not isinstance(kind, str) or kind not in _TYPES):
        raise BadRequest(
            f"{field} is of type {str(kind)[:40]!r}; texts and images are served", param=root_of(field)
        )


def _read_content(content: Any, field: str) -> Draft:
    """The texts of a message joined, and its images in their order."""
    if isinstance(content, str):
        return Draft(content, (), field)
    if not isinstance(content, list):
        raise BadRequest(
            f"{field}.content is {kind_of(content)}; it takes a string, or a list of parts",
            param=root_of(field),
        )
    parts = [_read_part(part, f"{field}.content[{i}]") for i, part in enumerate(content)]
    images = tuple(image for part in parts for image in part.images)
    return Draft("".join(part.text for part in parts), images, field)


def _read_part(part: Any, field: str) -> Draft:
    if isinstance(part, dict) and part.get("content") is not None:
        raise BadRequest(f"{field} holds a content of its own; it takes a part", param=root_of(field))
    return _read(part, field)


def _references(value: Any, field: str) -> list[Reference]:
    if isinstance(value, list):
        if len(value) > _MAX_IMAGES:
            raise BadRequest(
                f"{field} has {len(value)} images; one item may have {_MAX_IMAGES}", param=root_of(field)
            )
        return [found for i, one in enumerate(value) for found in _references_of(one, f"{field}[{i}]")]
    return _references_of(value, field)


def _references_of(value: Any, field: str) -> list[Reference]:
    if isinstance(value, dict):
        value, field = value.get("url"), f"{field}.url"
    if not isinstance(value, str):
        raise BadRequest(
            f"{field} is {kind_of(value)}; an image is a URL, a data URL or base64, as a string",
            param=root_of(field),
        )
    return [Reference(value, field)]
