"""The model families that can be served. One file each; a new family is a file and a line here."""

from __future__ import annotations

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError
from backends.families import bert
from backends.families.base import Family

FAMILIES: dict[str, Family] = {"bert": bert.FAMILY}


def family_of(checkpoint: Checkpoint, model_type: str | None = None) -> Family:
    """The family of a checkpoint, by its model_type or by the one that a person gives.

    Raises CheckpointError, which lists the families, when there is none.
    """
    wanted = model_type or checkpoint.model_type
    for family in FAMILIES.values():
        if wanted in family.model_types:
            return family
    known = ", ".join(sorted(t for family in FAMILIES.values() for t in family.model_types))
    raise CheckpointError(
        f"{checkpoint.path} is a {wanted!r} model ({checkpoint.architecture or 'no architecture named'}), "
        f"which is not served; the model types served are: {known}"
    )
