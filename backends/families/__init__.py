"""The architectures that can be served. One file each; a new family is a file and a line here."""

from __future__ import annotations

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError
from backends.families import (
    albert,
    bert,
    clip,
    deberta,
    distilbert,
    electra,
    eurobert,
    gemma,
    gemma3,
    gte,
    jina_v3,
    llama,
    mistral,
    modernbert,
    mpnet,
    nomic_bert,
    qwen2,
    qwen2_5_vl,
    qwen2_vl,
    qwen3,
    qwen3_vl,
    roberta,
    xlm_roberta,
)
from backends.families.base import Family

FAMILIES: dict[str, Family] = {
    "albert": albert.FAMILY,
    "bert": bert.FAMILY,
    "clip": clip.FAMILY,
    "deberta": deberta.FAMILY,
    "distilbert": distilbert.FAMILY,
    "electra": electra.FAMILY,
    "eurobert": eurobert.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma3": gemma3.FAMILY,
    "gte": gte.FAMILY,
    "jina_v3": jina_v3.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "modernbert": modernbert.FAMILY,
    "mpnet": mpnet.FAMILY,
    "nomic_bert": nomic_bert.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_5_vl": qwen2_5_vl.FAMILY,
    "qwen2_vl": qwen2_vl.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_vl": qwen3_vl.FAMILY,
    "roberta": roberta.FAMILY,
    "xlm_roberta": xlm_roberta.FAMILY,
}


def family_of(checkpoint: Checkpoint, model_type: str | None = None) -> Family:
    """The family of a checkpoint, by config.json's model_type.

    A person's `model_type` stands in where config.json has none, and must fit where it has one: another
    family's rules on this checkpoint's weights would give wrong numbers without any error. Raises
    CheckpointError, which lists the families, when there is none.
    """
    own = checkpoint.model_type
    wanted = own or model_type
    if not wanted:
        raise CheckpointError(f"{checkpoint.path}/config.json has no model_type; give it with --model-type")
    family = next((f for f in FAMILIES.values() if wanted in (f.model_types if own else f.names)), None)
    if model_type and own and model_type != own and (family is None or model_type not in family.names):
        raise CheckpointError(
            f"--model-type is {model_type!r}, but {checkpoint.path}/config.json says {own!r}; leave "
            "the option out"
        )
    if family is not None and family.vision is not None and not own:
        raise CheckpointError(
            f"{checkpoint.path}/config.json has no model_type; a model of texts and images needs one there "
            f"({', '.join(family.model_types)}), for much else depends on it"
        )
    if family is not None:
        return family
    known = ", ".join(sorted(t for family in FAMILIES.values() for t in family.model_types))
    raise CheckpointError(
        f"{checkpoint.path} is a {wanted!r} model ({checkpoint.architecture or 'no architecture named'}), "
        f"which is not served; the model types served are: {known}"
    )
