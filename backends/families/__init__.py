"""The model families that can be served. One file each; a new family is a file and a line here."""

from __future__ import annotations

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError
from backends.families import bert
from backends.families.base import Family

FAMILIES: dict[str, Family] = {"bert": bert.FAMILY}


def family_of(checkpoint: Checkpoint, model_type: str | None = None) -> Family:
    """The family of a checkpoint, by config.json's model_type.

    A person's `model_type` stands in where config.json has none, and must fit where it has one: another
    family's rules on this checkpoint's weights would give wrong numbers without any error. Raises
    CheckpointError, which lists the families, when there is none.
    """
    own = checkpoint.model_type
    if model_type and own and model_type != own:
        raise CheckpointError(
            f"--model-type is {model_type!r}, but {checkpoint.path}/config.json says {own!r}; leave "
            "the option out"
        )
    wanted = own or model_type
    if not wanted:
        raise CheckpointError(f"{checkpoint.path}/config.json has no model_type; give it with --model-type")
    for family in FAMILIES.values():
        if wanted in family.model_types:
            return family
    known = ", ".join(sorted(t for family in FAMILIES.values() for t in family.model_types))
    raise CheckpointError(
        f"{checkpoint.path} is a {wanted!r} model ({checkpoint.architecture or 'no architecture named'}), "
        f"which is not served; the model types served are: {known}"
    )
