"""The image stage: image [n, k] -> patches [1, p, c], image_grid [n, k, 3].

Without torch, and in a process of its own: reading files holds up nobody's texts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.clock import now_us
from backends.contract import IMAGE, IMAGE_GRID, IMAGE_TIMES, PATCHES
from backends.errors import CheckpointError, RequestError
from backends.families import family_of
from backends.grouping import neighbours
from backends.image_file import MAX_PIXELS, PixelBudget, read_image
from backends.image_processing import Grid, Patches
from backends.stages.base import Stage, StageContext
from backends.stages.request import StageRequest
from backends.stages.response import Answer

Seen = tuple[Patches, Grid]
# Pixels of so many pictures, and as many patches, are in memory at once, besides those of one request.
_IMAGES_AT_ONCE = 16


class ImageStage(Stage):
    """Reads image files and makes them ready for the model."""

    def setup(self, context: StageContext) -> None:
        vision = family_of(context.checkpoint, context.options.model_type).vision
        if vision is None:
            raise CheckpointError(f"{context.checkpoint.path} is a model of texts only")
        self.processor = vision.processor(context.checkpoint, context.options)
        self.width = 3 * self.processor.patch_size**2
        self.budget = PixelBudget(MAX_PIXELS)
        # Pillow's decoders and filters let other threads run.
        self.pool = ThreadPoolExecutor(context.options.threads or len(os.sched_getaffinity(0)))

    def cut(self, batch: Sequence[StageRequest]) -> list[range]:
        """Groups of few images: the encoder begins with the first while the next are read."""
        return neighbours((request.array(IMAGE).size for request in batch), _IMAGES_AT_ONCE)

    def run(self, batch: Sequence[StageRequest]) -> list[Answer | RequestError]:
        begun = now_us()
        files = [request.array(IMAGE) for request in batch]
        jobs = (
            (data, item, place, array.shape[1])
            for array in files
            for item, row in enumerate(array)
            for place, data in enumerate(row)
        )
        seen = iter(list(self.pool.map(self._see, jobs)))
        answers = [_answer(array, [next(seen) for _ in range(array.size)], self.width) for array in files]
        # Images of all are read side by side: they are ready together.
        times = np.array([[begun, now_us()]], np.int64)
        return [a if isinstance(a, RequestError) else {**a, IMAGE_TIMES: times} for a in answers]

    def _see(self, job: tuple[bytes, int, int, int]) -> Seen | RequestError | None:
        """None where there is no image."""
        data, item, place, most = job
        if not data:
            return None
        try:
            with read_image(data, budget=self.budget) as picture:
                return self.processor(picture)
        except RequestError as error:
            which = f"image {place + 1} of this item: " if most > 1 else ""
            return RequestError(error.failure.code, f"{which}{error.failure.message}", item)


def _answer(
    files: npt.NDArray[Any], seen: Sequence[Seen | RequestError | None], width: int
) -> Answer | RequestError:
    grids = np.zeros((*files.shape, 3), np.int32)
    patches: list[Patches] = [np.empty((0, width), np.uint8)]
    for place, one in zip(np.ndindex(*files.shape), seen, strict=True):
        if isinstance(one, RequestError):
            return one
        if one is not None:
            patches.append(one[0])
            grids[place] = one[1]
    return {PATCHES: np.concatenate(patches)[None], IMAGE_GRID: grids}
