"""Whether /dev/shm is large enough for what the models of a repository hand on through it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2

from backends.contract import HIDDEN, TOKEN_EMBEDDINGS
from backends.options import ServingOptions
from backends.repository.pbtxt import parse

SHARED_MEMORY = Path("/dev/shm")
MIB = 2**20
# A row for each token; other answers are small beside them.
_WIDE = (HIDDEN, TOKEN_EMBEDDINGS)
_BYTES = {"FP32": 4, "FP16": 2, "BF16": 2}


def warn_of_small(repository: Path) -> str | None:
    """What to tell the operator where less is there than full turns of all models may take."""
    size = shutil.disk_usage(SHARED_MEMORY).total
    needed = need(repository)
    if size >= needed:
        return None
    return (
        f"{SHARED_MEMORY} has {size // MIB} MiB, and the models may need {-(-needed // MIB)} MiB: large "
        "requests will be answered with 503; give the container more with --shm-size, or lower "
        "--max-batch-tokens (triton-embeddings add)"
    )


def need(repository: Path) -> int:
    """Bytes of tokens' states that all stages may hold at once: every process keeps, for good, as much as its
    largest answer or batch took.
    """
    return sum(_wide_bytes(parse(file.read_text())) for file in repository.glob("*/config.pbtxt"))


def _wide_bytes(config: Any) -> int:
    """Of a full turn, once where a stage gives them and once where it takes them."""
    if config.platform == "ensemble":
        return 0
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    tokens = ServingOptions.from_parameters(parameters).max_batch_tokens
    tensors = [tensor for tensor in (*config.input, *config.output) if tensor.name in _WIDE]
    return sum(tokens * tensor.dims[-1] * _item_bytes(tensor.data_type) for tensor in tensors)


def _item_bytes(data_type: int) -> int:
    return _BYTES[model_config_pb2.DataType.Name(data_type).removeprefix("TYPE_")]
