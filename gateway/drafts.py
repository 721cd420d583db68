"""Inputs whose images are not there yet -> items, if the model takes them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from gateway.batches import Content, Item
from gateway.catalog import Catalog, Needs
from gateway.contents import Draft, Reference
from gateway.errors import BadRequest, BodyTooLarge, root_of
from gateway.images import ImageLoader
from gateway.pipeline import Pipeline
from gateway.tasks import Items
from gateway.urgency import time_limit

# Minutes of work for a large model, and as many fetches.
_MAX_IMAGES = 256
# A body's own limit does not bound what is fetched.
_MAX_IMAGE_BYTES = 256 * 2**20
# A few, so that a request with many leaves turns to others.
_FETCHES_AT_ONCE = 4


@dataclass(frozen=True)
class Drafts:
    """One list of inputs."""

    items: Items
    """Texts or token ids; of an item with images its text, which may be empty."""
    with_images: Mapping[int, Draft]
    """The items with images, by their place."""
    field: str
    """What the client calls the list."""

    @property
    def has_images(self) -> bool:
        """Whether an item has one."""
        return bool(self.with_images)

    @property
    def needs(self) -> Needs:
        """What a model must take for these inputs."""
        several = any(draft.text or len(draft.images) > 1 for draft in self.with_images.values())
        return Needs(images=self.has_images, fuses=several)


async def load_items(
    images: ImageLoader, catalog: Catalog, pipeline: Pipeline, *lists: Drafts
) -> list[Items]:
    """The items of all lists of a request, with their images.

    Raises BadRequest: for images that the model does not take, before any is fetched; else for the first one
    that cannot be had. Raises TimedOut where the request's own deadline passes.
    """
    drafts = [draft for one in lists for draft in one.with_images.values()]
    if not drafts:
        return [one.items for one in lists]
    _check(drafts, pipeline, catalog)
    files = iter(await _load(images, [reference for draft in drafts for reference in draft.images]))
    return [_fill(one, files) for one in lists]


def _check(drafts: Sequence[Draft], pipeline: Pipeline, catalog: Catalog) -> None:
    name = pipeline.served_model_name
    first = drafts[0]
    if not pipeline.takes_images:
        able = [p.served_model_name for p in catalog.pipelines if p.takes_images]
        raise BadRequest(
            f"the model {name} takes texts only, and {first.field} holds an image"
            + (f"; images are taken by {', '.join(able)}" if able else ""),
            param=root_of(first.field),
        )
    for draft in drafts:
        count = len(draft.images)
        if not pipeline.fuses and (draft.text or count > 1):
            held = "an image" if count == 1 else f"{count} images"
            raise BadRequest(
                f"{draft.field} holds {'a text and ' if draft.text else ''}{held}; the model {name} embeds a "
                f"text or an image: send them as {count + bool(draft.text)} items",
                param=root_of(draft.field),
            )
    total = sum(len(draft.images) for draft in drafts)
    if total > _MAX_IMAGES:
        raise BadRequest(
            f"the request has {total} images; at most {_MAX_IMAGES} can be sent in one",
            param=root_of(first.field),
        )


async def _load(images: ImageLoader, references: Sequence[Reference]) -> list[bytes]:
    gate = asyncio.Semaphore(_FETCHES_AT_ONCE)
    total = 0

    async def load(reference: Reference) -> bytes:
        nonlocal total
        async with gate:
            is_full = total > _MAX_IMAGE_BYTES
            file = b"" if is_full else await images.load(reference.value, reference.field)
            total += len(file)
        if total > _MAX_IMAGE_BYTES:
            raise BodyTooLarge(
                f"the images of the request have more than {_MAX_IMAGE_BYTES} bytes in all; send fewer at a "
                "time",
                param=root_of(reference.field),
            )
        return file

    limit = time_limit(images.timeout_s)
    # The request's own, if that is shorter than the operator's.
    own = limit.watch("what the request's images are fetched from") if limit and limit.own else nullcontext()
    loads = [asyncio.create_task(load(reference)) for reference in references]
    try:
        async with own, asyncio.timeout(images.timeout_s):
            # In their order: whichever fails first, the client is told the first in its list.
            return [await one for one in loads]
    except TimeoutError:
        # The one that was waited for is cancelled with the wait.
        late = next(
            reference
            for reference, one in zip(references, loads, strict=True)
            if one.cancelled() or not one.done()
        )
        raise BadRequest(
            f"{late.field} and all images before it were not there within {images.timeout_s:g} s; send fewer "
            "at a time, or as data URLs (the operator can wait longer with GATEWAY_IMAGES_TIMEOUT_S)",
            param=root_of(late.field),
        ) from None
    finally:
        for one in loads:
            one.cancel()
        await asyncio.gather(*loads, return_exceptions=True)


def _fill(drafts: Drafts, files: Iterator[bytes]) -> Items:
    """The items, which take as many files as they have references."""
    elements: list[Item] = list(drafts.items.elements)
    for i, draft in drafts.with_images.items():
        elements[i] = Content(draft.text.encode(), tuple(next(files) for _ in draft.images))
    return Items(elements)
