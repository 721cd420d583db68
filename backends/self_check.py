"""Finds out at load how a model can run: packed if that is proved right, else padded.

It must call the packed attention function, and two short sequences packed must give what each gives alone.
Some model classes (MPNet, DeBERTa) take no attention function and would let every sequence look at its
neighbours without any error: for those the padded way is checked the same way, and a model that fails both is
refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError
from backends.families.base import Family
from backends.forward import Forward, PackedForward, PaddedForward, Segments, register_attention
from backends.fusion import fuse
from backends.fusion.on_cpu import compiles_long_rows
from backends.model_config import vision_config
from backends.ragged import Ragged
from backends.vision import Images, Sees, see
from kernels import packed_attention

logger = logging.getLogger(__name__)

# Lengths of the sequences of the self-check: different, so that a shifted boundary shows.
_CHECK_LENGTHS = (5, 11)
# Largest relative error (norm of the difference over the norm) that rounding explains; a sequence that sees
# its neighbours is off by 0.1 and more.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# Of a quantized model against itself in float32: a wrong layer is off by 0.5 and more.
_QUANTIZED_TOLERANCE = {"int8": 0.3, "float16": 1e-2}


Loader = Callable[[str | None], torch.nn.Module]
"""Name of an attention function, or None for the model's own choice -> the model."""


class _CannotQuantizeError(ValueError):
    """The weights cannot be kept as somebody wants them."""


def choose_forward(
    load: Loader,
    family: Family,
    config: dict[str, Any],
    name: str,
    *,
    shares_prefixes: bool = False,
    quantization: str = "none",
    must_quantize: bool = True,
) -> Forward:
    """The packed way if the model passes the self-check, else the padded way, with a logged warning.

    `shares_prefixes` is for causal models: what sequences begin with is computed once, if that is proved to
    change nothing; `quantization` is one of `backends.options.QUANTIZATIONS`, but not auto. Raises
    CheckpointError when the model fails both ways, or cannot be quantized so and must be. `name` stands in
    the messages.
    """
    register_attention()

    def speed_up(forward: PackedForward | PaddedForward, attention: str | None) -> None:
        reload = partial(_load, load, attention, name)
        try:
            _speed_up(forward, name, reload, quantization)
        except _CannotQuantizeError as reason:
            if must_quantize:
                raise CheckpointError(f"{reason}; leave --quantization out") from reason
            logger.warning("%s: its weights stay in float32", reason)
            forward.model = reload()
            _speed_up(forward, name, reload, "none")

    packed = PackedForward(_load(load, packed_attention.NAME, name), family, config)
    fault = _packed_fault(packed)
    if fault is None:
        speed_up(packed, packed_attention.NAME)
        if shares_prefixes:
            error = _check_sharing(packed)
            packed.shares_prefixes = error <= tolerance(packed.model)
            if not packed.shares_prefixes:
                logger.warning(
                    "%s gives other numbers behind a shared prefix (relative error %.2g): every sequence is "
                    "computed whole, which is slower",
                    name,
                    error,
                )
        packed.attention_calls = 0
        return packed
    logger.warning("%s cannot run packed (%s): it runs padded, which is slower", name, fault)
    padded = PaddedForward(_load(load, None, name), family, config)
    error = _self_check(padded)
    if not error <= tolerance(padded.model):
        raise CheckpointError(
            f"{name} gives other numbers in a batch than alone, packed ({fault}) and padded (relative error "
            f"{error:.2g}): it cannot be served right"
        )
    speed_up(padded, None)
    return padded


def _speed_up(
    forward: PackedForward | PaddedForward,
    name: str,
    reload: Callable[[], torch.nn.Module],
    quantization: str,
) -> None:
    """Fuses the model, if that changes no number beyond rounding. Raises _CannotQuantizeError."""
    lengths = np.array(_CHECK_LENGTHS)
    batch = Ragged(_check_ids(forward, int(lengths.sum())), lengths)
    with torch.inference_mode():
        before = forward(batch).float()
        try:
            is_fused = bool(fuse(forward.model, quantization))
        except ValueError as reason:
            if quantization == "none":
                raise
            raise _CannotQuantizeError(f"{name} cannot be quantized to {quantization}: {reason}") from reason
        if not is_fused:
            if quantization != "none":
                raise _CannotQuantizeError(
                    f"{name} cannot be quantized to {quantization}: that takes a CPU for which torch has the "
                    "products, and weights in float32 (--device cpu --dtype float32)"
                )
            return
        try:
            error = relative_error(forward(batch).float(), before)
        except Exception as problem:  # the compiler of kernels has errors of its own
            error = float("inf")
            logger.warning("%s: %s", name, problem)
    if error <= _QUANTIZED_TOLERANCE.get(quantization, tolerance(forward.model)):
        if isinstance(forward, PackedForward):
            forward.fills_long_rows = compiles_long_rows(forward.model)
        return
    if quantization != "none":
        raise _CannotQuantizeError(
            f"{name} gives other numbers quantized to {quantization} (relative error {error:.2g})"
        )
    logger.warning(
        "%s gives other numbers with fused layers (relative error %.2g): they stay as they were, which is "
        "slower",
        name,
        error,
    )
    forward.model = reload()


def relative_error(values: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values - expected) / torch.linalg.vector_norm(expected))


def _load(load: Loader, attention: str | None, name: str) -> torch.nn.Module:
    try:
        return load(attention)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "ignore_mismatched_sizes" in first_line:
            first_line = "they have other shapes than config.json says"
        raise CheckpointError(f"the weights of {name} cannot be loaded: {first_line}") from error


def _packed_fault(forward: PackedForward) -> str | None:
    try:
        error = _self_check(forward)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError) as problem:
        return f"the self-check failed: {problem}"
    if forward.attention_calls == 0:
        return f"{type(forward.model).__name__} takes no attention function"
    if not error <= tolerance(forward.model):  # also when it is NaN
        return f"relative error {error:.2g} between packed and one by one"
    return None


def _self_check(forward: PackedForward | PaddedForward) -> float:
    """Relative error between two sequences in one batch and the same two one by one."""
    lengths = np.array(_CHECK_LENGTHS)
    batch = Ragged(_check_ids(forward, int(lengths.sum())), lengths)
    with torch.inference_mode():
        together = forward(batch).float()
        alone = torch.cat([forward(Ragged.pack([one])).float() for one in batch.split()])
    return relative_error(together, alone)


def _check_sharing(forward: PackedForward) -> float:
    """Relative error between two sequences that begin alike computed whole, and behind a shared segment."""
    lengths = np.array([sum(_CHECK_LENGTHS)] * 2)
    ids = _check_ids(forward, int(lengths.sum()))
    shared, rest = _CHECK_LENGTHS[1], _CHECK_LENGTHS[0]
    first, second = ids[: shared + rest], torch.cat([ids[:shared], ids[-rest:]])
    row = Ragged(torch.cat([first[:shared], first[shared:], second[shared:]]), np.array([shared, rest, rest]))
    segments = Segments(np.array([0, shared, shared]), [(), ((0, shared),), ((0, shared),)])
    with torch.inference_mode():
        together = forward(row, segments=segments).float()
        alone = [forward(Ragged.pack([one])).float() for one in (first, second)]
    whole = torch.cat([alone[0], alone[1][shared:]])
    return relative_error(together, whole)


def check_seeing(model: Sees, checkpoint: Checkpoint, *, is_item: bool) -> None:
    """Two images together must give what each gives alone; `is_item` where all images have one size.

    Raises CheckpointError.
    """
    config = vision_config(checkpoint.config)
    side = int(config["image_size"]) // int(config["patch_size"]) if is_item else 4
    grids = np.array([(1, side, side), (1, side, side if is_item else 2 * side)])
    counts = grids.prod(axis=1)
    channels = 3 * int(config["patch_size"]) ** 2
    noise = torch.arange(int(counts.sum()) * channels) * 7919 % 251
    images = Images(noise.to(torch.uint8).view(-1, channels), grids)
    alone = [Images(images.patches[: counts[0]], grids[:1]), Images(images.patches[counts[0] :], grids[1:])]
    with torch.inference_mode():
        together = see(model, images, int(counts.sum()))
        apart = torch.cat([see(model, one, int(counts.sum())) for one in alone])
    error = relative_error(together.float(), apart.float())
    if not error <= _TOLERANCE[together.dtype]:
        raise CheckpointError(
            f"{checkpoint.path} sees an image differently beside others (relative error {error:.2g}): it "
            "cannot be served right"
        )


def _check_ids(forward: PackedForward | PaddedForward, count: int) -> torch.Tensor:
    """int64 [count], spread over the vocabulary; id 0 is padding in most vocabularies."""
    vocabulary = int(forward.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    return torch.arange(1, count + 1, device=forward.device) * 7919 % (vocabulary - 1) + 1


def tolerance(model: torch.nn.Module) -> float:
    return _TOLERANCE[next(model.parameters()).dtype]
