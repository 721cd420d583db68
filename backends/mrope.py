"""Positions of texts with images in three axes: time, height and width.

A word has one position, the same on all axes. The tokens of an image lie on a grid that begins at the
position behind the last word, and the next word stands behind the grid's longer side.

*Source:* M-RoPE of Qwen2-VL (arXiv 2409.12191); transformers 5.23, Qwen2VLModel.get_rope_index.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from backends.ragged import Lengths, positions


def mrope_positions(
    is_image: npt.NDArray[np.bool_], lengths: Lengths, grids: npt.NDArray[np.int64], merge: int
) -> Lengths:
    """[3, t] for sequences of `lengths` [n] end to end, of whose tokens `is_image` [t] says which are of
    images.

    `grids` [m, 3] are the images' patches in the order of their tokens; `merge` by `merge` patches are a
    token.
    """
    places: Lengths = np.tile(positions(lengths), (3, 1))
    tokens = np.flatnonzero(is_image)
    ends = np.cumsum(lengths)
    done = 0
    for frames, rows, columns in grids // np.array([1, merge, merge]):
        start, count = int(tokens[done]), int(frames * rows * columns)
        stop = int(ends[np.searchsorted(ends, start, side="right")])
        grid = np.indices((frames, rows, columns)).reshape(3, -1)
        places[:, start + count : stop] -= count - max(rows, columns)
        places[:, start : start + count] = places[0, start] + grid
        done += count
    return places
