"""Mistral: causal, with a window in its first versions (E5-Mistral, SFR-Embedding-Mistral, Linq-Embed)."""

from backends.families.base import INSTRUCT, Family

FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    is_decoder=True,
    instruction=INSTRUCT,
)
