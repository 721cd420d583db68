"""Llama, and what is built like it."""

from backends.families.base import INSTRUCT, Family

FAMILY = Family(
    name="llama",
    model_types=("llama",),
    is_decoder=True,
    instruction=INSTRUCT,
)
