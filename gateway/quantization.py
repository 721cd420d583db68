"""Embeddings in fewer bytes: a byte or a bit for each component.

*Source:* sentence-transformers 6.2 util/quantization.py for the bits, which are Cohere's, too. Its int8
needs the ranges of a corpus, which a server of single requests does not have.
"""

from __future__ import annotations

import numpy as np

from gateway.batches import Array


def to_int8(vectors: Array) -> Array:
    """float32 [n, d] -> int8 [n, d], -127 to 127: each vector by its own largest component.

    Cosines between such vectors are those of the embeddings, but for the rounding; dot products are not.
    """
    largest = np.abs(vectors).max(1, keepdims=True)
    # A vector of zeros stays one.
    scaled = vectors / np.where(largest == 0, 1, largest) * 127
    result: Array = np.rint(scaled).astype(np.int8)
    return result


def to_uint8(vectors: Array) -> Array:
    """float32 [n, d] -> uint8 [n, d]: to_int8 plus 128. Take 128 off before comparing."""
    return _shift(to_int8(vectors)).view(np.uint8)


def to_ubinary(vectors: Array) -> Array:
    """float32 [n, d] -> uint8 [n, d / 8]: a bit for each component, set where it is more than 0.

    The first is the highest bit of a byte; the last byte is filled up with zeros.
    """
    packed: Array = np.packbits(vectors > 0, axis=1)
    return packed


def to_binary(vectors: Array) -> Array:
    """float32 [n, d] -> int8 [n, d / 8]: to_ubinary minus 128."""
    return _shift(to_ubinary(vectors)).view(np.int8)


def _shift(values: Array) -> Array:
    """Bytes plus or minus 128, which are the same bits."""
    result: Array = values.view(np.uint8) ^ np.uint8(128)
    return result


QUANTIZATIONS = {"int8": to_int8, "uint8": to_uint8, "binary": to_binary, "ubinary": to_ubinary}
