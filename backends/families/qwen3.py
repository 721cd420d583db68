"""Qwen3 (Qwen3-Embedding, Qwen3-Reranker): causal.

*Source:* its instruction has no blank behind "Query:", unlike all others': FlagEmbedding 1.4.2's map of
models, and the prompts of the published checkpoints.
"""

from backends.families.base import Family

FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    other_names=("qwen_3",),
    is_decoder=True,
    instruction="Instruct: {}\nQuery:",
)
