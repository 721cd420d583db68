"""Gemma, as bge-reranker-v2-gemma uses it: causal.

float16 overflows in this family, as in Gemma 3.
"""

from backends.families.base import Family

FAMILY = Family(
    name="gemma",
    model_types=("gemma",),
    is_decoder=True,
    unsupported_dtypes=("float16",),
)
