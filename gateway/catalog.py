"""The models that the server has loaded, and which one a request means."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from backends.contract import Task
from gateway.context import current
from gateway.errors import Forbidden, GatewayError, TimedOut, Unavailable, UnknownModel, WrongTask, shorten
from gateway.inference import Inference
from gateway.pipeline import Pipeline

# A client that asks for a model that is not there makes the gateway look again, but not more often than this.
_REFRESH_INTERVAL_S = 0.1


@dataclass(frozen=True)
class Needs:
    """What the inputs of a request ask of a model."""

    images: bool = False
    fuses: bool = False
    """That one item may hold a text and images, or several."""

    def __or__(self, other: Needs) -> Needs:
        return Needs(self.images or other.images, self.fuses or other.fuses)


NO_NEEDS = Needs()


class Catalog:
    """Looks up models by the names that clients use. Inside of a request there are no models but those that
    its key may use.
    """

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._pipelines: list[Pipeline] = []
        self._began_at = self._looked_at = float("-inf")
        self._listing: asyncio.Task[None] | None = None

    @property
    def pipelines(self) -> list[Pipeline]:
        """The models known at the last look, by name."""
        return [pipeline for pipeline in self._pipelines if _may_use(pipeline)]

    async def refresh(self) -> list[Pipeline]:
        """Asks the server; of all who want that at once a look serves those who came before it began.

        Raises GatewayError when it does not answer; the models known before stay known.
        """
        under_way = self._listing
        if under_way is not None and not under_way.done():
            # It may have begun before what the caller has just changed.
            await asyncio.wait([under_way])
        if self._listing is under_way:
            self._listing = self._begin_listing()
        return await self._latest()

    async def _latest(self) -> list[Pipeline]:
        """What the last look gives. Who leaves does not end it for those who wait, too."""
        assert self._listing is not None
        await asyncio.shield(self._listing)
        return self.pipelines

    def _begin_listing(self) -> asyncio.Task[None]:
        task = asyncio.create_task(self._list())
        # Whoever waits is told of a failure; it is no news to the log where all have left.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _list(self) -> None:
        self._began_at = time.monotonic()
        try:
            self._pipelines = await self._inference.pipelines()
        finally:
            self._looked_at = time.monotonic()

    async def find(self, model: str | None, *tasks: Task, needs: Needs = NO_NEEDS) -> Pipeline:
        """The model of that name; without a name, the first that serves all the tasks, and of these one that
        takes what is needed if there is one.

        Raises UnknownModel with the known names, Forbidden for one that the request's key may not use,
        WrongTask for a model that does not serve a task, Unavailable when the server cannot tell.
        """
        found = self._match(model, tasks, needs)
        if found is None:
            await self._look_again()
            found = self._match(model, tasks, needs)
        if found is None:
            raise self._unknown(model, tasks)
        if not _may_use(found):
            raise self._forbidden(model or found.served_model_name)
        missing = [task for task in tasks if task not in found.tasks]
        if missing:
            raise WrongTask(
                f"the model {found.served_model_name} does not serve {', '.join(missing)}; {_offer(found)}"
                f"{self._others(missing)}",
                param="model",
                code="wrong_task",
            )
        return found

    async def _look_again(self) -> None:
        """For somebody who misses a model: waits for a look that began after that, as the model may have been
        added a moment ago.
        """
        asked, context = time.monotonic(), current()
        try:
            # The loop's clock is time.monotonic().
            async with asyncio.timeout_at(None if context is None else context.deadline):
                while self._began_at < asked:
                    pause = self._looked_at + _REFRESH_INTERVAL_S - time.monotonic()
                    if self._listing is not None and not self._listing.done():
                        await asyncio.wait([self._listing])
                    elif pause > 0:
                        await asyncio.sleep(pause)
                    else:
                        self._listing = self._begin_listing()
                await self._latest()
        except TimeoutError:
            assert context is not None
            if self._pipelines:
                # Those known before are what can be told in that time.
                return
            raise TimedOut(
                f"the list of models did not come within {context.time_limit}; give it more time"
            ) from None

    def _match(self, model: str | None, tasks: Sequence[Task], needs: Needs) -> Pipeline | None:
        if not model:
            able = [p for p in self.pipelines if p.tasks.issuperset(tasks)]
            # A reranker can be asked for its logits, but who asks for classes means a classifier.
            return min(
                able,
                key=lambda p: (
                    Task.CLASSIFY in tasks and Task.SCORE in p.tasks,
                    needs.images and not p.takes_images,
                    needs.fuses and not p.fuses,
                ),
                default=None,
            )
        own = (p for p in self._pipelines if model in (p.served_model_name, p.name))
        other = (p for p in self._pipelines if model in p.other_names)
        return next(own, None) or next(other, None)

    def _others(self, tasks: Sequence[Task]) -> str:
        """Who serves what a model does not."""
        names = [p.served_model_name for p in self.pipelines if p.tasks.issuperset(tasks)]
        return f"; {' and '.join(tasks)} is served by {', '.join(names)}" if names else ""

    def _unknown(self, model: str | None, tasks: Sequence[Task]) -> GatewayError:
        if not self._pipelines:
            return Unavailable("no model is loaded yet; try again in a while")
        if not self.pipelines:
            return self._forbidden(model)
        names = ", ".join(p.served_model_name for p in self.pipelines)
        if not model:
            offers = "; ".join(_offer(p, p.served_model_name) for p in self.pipelines)
            return WrongTask(
                f"no model here serves {' and '.join(tasks)}; {offers}", param="model", code="wrong_task"
            )
        return UnknownModel(
            f"the model {shorten(model)} does not exist here; there are: {names}",
            param="model",
            code="model_not_found",
        )

    def _forbidden(self, model: str | None) -> Forbidden:
        context = current()
        assert context is not None
        names = ", ".join(p.served_model_name for p in self.pipelines)
        use = f"it may use: {names}" if names else "none of those that it may use is loaded here"
        what = f"the model {shorten(model)}" if model else "any of the models here"
        return Forbidden(
            f"the key {context.key_name!r} may not use {what}; {use}", param="model", code="model_not_allowed"
        )


def _may_use(pipeline: Pipeline) -> bool:
    context = current()
    if context is None or context.models is None:
        return True
    return not context.models.isdisjoint((pipeline.served_model_name, pipeline.name))


def _offer(pipeline: Pipeline, name: str = "it") -> str:
    return f"{name} serves {', '.join(sorted(pipeline.tasks))}"
