"""The three representations that requests ask for by name, and mixes of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from backends.contract import Task
from gateway.errors import BadRequest, shorten

KIND_TASKS = {"dense": Task.EMBED, "sparse": Task.SPARSE, "colbert": Task.COLBERT}
"""What requests call the three representations."""


# FlagEmbedding's own example of a mix for BGE-M3.
DEFAULT_WEIGHTS = {"dense": 0.4, "sparse": 0.2, "colbert": 0.4}


def read_weights(given: Mapping[str, float] | Sequence[float] | None) -> dict[str, float] | None:
    """The kinds of a mix that count, by kind or as a list in the order of DEFAULT_WEIGHTS.

    Raises BadRequest.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping) and len(given) != len(DEFAULT_WEIGHTS):
        raise BadRequest(
            f"weights has {len(given)} numbers; it takes three, of {', '.join(DEFAULT_WEIGHTS)}",
            param="weights",
        )
    pairs = given.items() if isinstance(given, Mapping) else zip(DEFAULT_WEIGHTS, given, strict=True)
    weights = dict(pairs)
    unknown = [kind for kind in weights if kind not in DEFAULT_WEIGHTS]
    if unknown:
        raise BadRequest(
            f"weights has {shorten(unknown[0])}; it takes {', '.join(DEFAULT_WEIGHTS)}", param="weights"
        )
    if any(not math.isfinite(weight) or weight < 0 for weight in weights.values()) or not sum(
        weights.values()
    ):
        raise BadRequest(
            "weights must be numbers of at least 0, and at least one of them more", param="weights"
        )
    return {kind: weight for kind, weight in weights.items() if weight}


def kinds_to_tasks(kinds: Collection[str]) -> list[Task]:
    """Each kind's task, once."""
    return [KIND_TASKS[kind] for kind in dict.fromkeys(kinds)]
