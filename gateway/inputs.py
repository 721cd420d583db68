"""What requests of all dialects say about texts: how to treat them, and the texts of pairs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from backends.contract import ErrorCode, Task
from gateway.errors import BadRequest, EmptyInput, shorten
from gateway.pipeline import Pipeline
from gateway.tasks import TextOptions

_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number that is not whole, or is huge",
    str: "a string",
    list: "a list",
}

# Of a million items that are no strings, one is enough to know.
Strings = Annotated[list[str], Field(fail_fast=True)]
"""A list of strings, however long."""
Numbers = Annotated[list[float], Field(fail_fast=True)]
"""A list of numbers, however long."""
# What the server's request parameters hold for sure, and more than anybody means.
MAX_INT = 2**31 - 1
SIDES = {"left": "left", "right": "right", "Left": "left", "Right": "right"}
"""text-embeddings-inference's spellings."""
ROLES = {
    "query": "query",
    "search_query": "query",
    "document": "document",
    "passage": "document",
    "search_document": "document",
}


class TextFields(BaseModel):
    """What a request may say besides its texts. Fields that are not named are ignored, null means absent."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = Field(
        None, description="May be left out: the first model that serves what is asked for answers then."
    )
    input_type: Literal["query", "search_query", "document", "passage", "search_document"] | None = Field(
        None, description="What the texts are, for models that treat queries and documents differently."
    )
    prompt_name: str | None = Field(None, description="One of the model's own prompts, such as query.")
    prompt: str | None = Field(None, description="A text that is put before every input.")
    instruction: str | None = Field(
        None,
        description="What a query is for, of models that were made for instructions; it stands where they "
        "expect it.",
    )
    instruct: str | None = Field(None, description="The same in the words of SGLang and RTP-LLM.")
    truncate: StrictBool | None = Field(
        None, description="Cut an input that is over the limit, or refuse it."
    )
    truncation_side: Literal["left", "right"] | None = Field(None, description="Which side is cut off.")
    normalize: StrictBool | None = Field(None, description="Unit length or not, whatever the model says.")
    dimensions: StrictInt | None = Field(
        None, ge=1, le=MAX_INT, description="Keep this many components of dense embeddings, and unit length."
    )
    top_k: StrictInt | None = Field(
        None, ge=1, le=MAX_INT, description="Keep this many of the largest sparse weights of each text."
    )


def text_options(
    body: TextFields, pipeline: Pipeline, tasks: Collection[Task], dimensions_field: str = "dimensions"
) -> TextOptions:
    """What a request asks of the pipeline. `dimensions_field` is what the dialect calls `dimensions`.
    Raises BadRequest for what the tasks cannot honour, and for dimensions that the model does not have.
    """
    if body.dimensions is not None:
        if Task.EMBED not in tasks:
            raise BadRequest(
                f"{dimensions_field} is for dense embeddings, which are not asked for here",
                param=dimensions_field,
            )
        _check_dimensions(body.dimensions, pipeline, dimensions_field)
    if body.top_k is not None and Task.SPARSE not in tasks:
        raise BadRequest("top_k is for sparse embeddings, which are not asked for here", param="top_k")
    truncation = None
    if body.truncate is False:
        truncation = "error"
    elif body.truncate or body.truncation_side:
        truncation = body.truncation_side or "right"
    return TextOptions(
        prompt_name=body.prompt_name,
        prompt=body.prompt,
        instruction=read_instruction(body.instruction, body.instruct, pipeline),
        truncation=truncation,
        dimensions=body.dimensions,
        normalize=body.normalize,
        role=ROLES[body.input_type] if body.input_type else None,
        top_k=body.top_k,
    )


def _check_dimensions(dimensions: int, pipeline: Pipeline, field: str) -> None:
    most, sizes = pipeline.dimensions, pipeline.matryoshka_dimensions
    if most is not None and dimensions > most:
        taken = f"1 to {most}"
    elif sizes and dimensions not in (*sizes, most):
        taken = f"one of {', '.join(map(str, sizes))}"
    else:
        return
    raise BadRequest(
        f"{field} is {dimensions}; {pipeline.served_model_name} takes {taken}",
        param=field,
        code=ErrorCode.INVALID_DIMENSIONS,
    )


def read_limit(truncate_prompt_tokens: int | None) -> int | None:
    """vLLM's limit of tokens; -1 and 0 are the model's own, which is None here."""
    return truncate_prompt_tokens if truncate_prompt_tokens and truncate_prompt_tokens > 0 else None


def read_instruction(instruction: str | None, instruct: str | None, pipeline: Pipeline) -> str | None:
    """What a request says under either name; an empty one is none. Raises BadRequest where they differ.

    `instruct` is SGLang's and RTP-LLM's, whose models without instructions do not look at it.
    """
    if instruction and instruct and instruction != instruct:
        raise BadRequest("instruction and instruct are two names of one thing; give one", param="instruct")
    return instruction or (instruct if pipeline.takes_instructions else None) or None


def kind_of(value: Any) -> str:
    """What a value of a body is called."""
    return _KINDS.get(type(value), "an object")


def read_text(value: Any, field: str, *, may_be_empty: bool = False) -> str:
    """One text: a string, {"text": ...}, or content parts of which all are texts. Raises BadRequest."""
    text = _join_parts(value, field)
    if not isinstance(text, str):
        raise BadRequest(f'{field} is {kind_of(value)}; it takes a text, or {{"text": "..."}}', param=field)
    if not text and not may_be_empty:
        raise EmptyInput(f"{field} is an empty string; send some text", param=field.split("[")[0])
    return text


def _join_parts(value: Any, field: str) -> Any:
    """The text of an object or of content parts, as vLLM and SGLang take them; anything else as it is."""
    if isinstance(value, dict) and isinstance(value.get("content"), (list, str)):
        value = value["content"]
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        kinds = [str(part.get("type", "text")) for part in value]
        other = [kind for kind in kinds if kind != "text"]
        if other:
            raise BadRequest(
                f"{field} holds a part of type {shorten(other[0])}; only texts are served", param=field
            )
        return "".join(str(part.get("text", "")) for part in value)
    # An object may carry an id and what else its owner needs beside its text.
    return value["text"] if isinstance(value, dict) and isinstance(value.get("text"), str) else value


def read_texts(value: Any, most: int, field: str, rank_fields: Sequence[str] | None = None) -> list[str]:
    """A list of texts, or one; texts may be empty. Raises BadRequest, which names the item at fault.

    `rank_fields` names the entries of documents that are objects; their values are read as Cohere does, a
    line each.
    """
    items = value if isinstance(value, list) else [value]
    if not items:
        raise EmptyInput(f"{field} is an empty list; send at least one text", param=field)
    if len(items) > most:
        raise BadRequest(
            f"{field} has {len(items)} texts; at most {most} can be sent in one request", param=field
        )
    return [
        read_text(_fields_of(item, rank_fields, f"{field}[{i}]"), f"{field}[{i}]", may_be_empty=True)
        for i, item in enumerate(items)
    ]


def _fields_of(item: Any, rank_fields: Sequence[str] | None, field: str) -> Any:
    if not isinstance(item, dict) or not rank_fields:
        return item
    found = {name: item[name] for name in rank_fields if item.get(name) is not None}
    if not found:
        raise BadRequest(f"{field} has none of the rank_fields {', '.join(rank_fields)}", param="rank_fields")
    if len(rank_fields) == 1:
        return str(*found.values())
    return "\n".join(f"{name}: {text}" for name, text in found.items())
