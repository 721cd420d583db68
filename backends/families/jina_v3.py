"""Jina Embeddings v3 in the layout of transformers: XLM-RoBERTa with rotary positions.

The task adapters of the original repository are not part of the class; a checkpoint with one of them merged
in is served like any other.
"""

from backends.families.base import Family

FAMILY = Family(
    name="jina_v3",
    model_types=("jina_embeddings_v3",),
    has_token_types=True,
    load_arguments={"add_pooling_layer": False},
)
