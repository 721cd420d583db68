"""A tiny checkpoint for every registered family; a test fails for a family that has none."""

from collections.abc import Callable
from pathlib import Path

from tests.support import checkpoints, multimodal

FAMILIES: dict[str, Callable[..., Path]] = {
    "albert": checkpoints.albert,
    "bert": checkpoints.bert,
    "clip": multimodal.clip,
    "deberta": checkpoints.deberta,
    "distilbert": checkpoints.distilbert,
    "electra": checkpoints.electra,
    "eurobert": checkpoints.eurobert,
    "gemma": checkpoints.gemma,
    "gemma3": checkpoints.gemma3,
    "gte": checkpoints.gte,
    "jina_v3": checkpoints.jina_v3,
    "llama": checkpoints.llama,
    "mistral": checkpoints.mistral,
    "modernbert": checkpoints.modernbert,
    "mpnet": checkpoints.mpnet,
    "nomic_bert": checkpoints.nomic_bert,
    "qwen2": checkpoints.qwen2,
    "qwen2_5_vl": multimodal.qwen2_5_vl,
    "qwen2_vl": multimodal.qwen2_vl,
    "qwen3": checkpoints.qwen3,
    "qwen3_vl": multimodal.qwen3_vl,
    "roberta": checkpoints.roberta,
    "xlm_roberta": checkpoints.xlm_roberta,
}
