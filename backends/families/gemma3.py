"""Gemma 3 text models, as EmbeddingGemma uses them: bidirectional where config.json says so.

float16 overflows in this family (Google's model card of embeddinggemma-300m: use float32 or bfloat16).
"""

from backends.families.base import Family

FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    # A cache of keys and values would be built, copied and thrown away.
    forward_arguments={"use_cache": False},
    unsupported_dtypes=("float16",),
)
