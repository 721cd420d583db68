"""The models that the server has loaded, and which one a request means."""

from __future__ import annotations

import asyncio
import time

from backends.contract import Task
from gateway.errors import BadRequest, Unavailable, UnknownModel
from gateway.inference import Inference, Pipeline

# A client that asks for a model that is not there makes the gateway look again, but not more often than this.
_REFRESH_INTERVAL_S = 1.0


class Catalog:
    """Looks up models by the names that clients use."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._pipelines: list[Pipeline] = []
        self._refreshed_at = float("-inf")
        self._lock = asyncio.Lock()

    @property
    def pipelines(self) -> list[Pipeline]:
        """The models known at the last look, by name."""
        return list(self._pipelines)

    async def refresh(self) -> list[Pipeline]:
        """Asks the server.

        Raises GatewayError when it does not answer; the models known before stay known.
        """
        async with self._lock:
            self._pipelines = await self._inference.pipelines()
            self._refreshed_at = time.monotonic()
        return self.pipelines

    async def find(self, model: str | None, task: Task | None = None) -> Pipeline:
        """The model of that name; without a name, the first that serves the task.

        Raises UnknownModel with the known names, BadRequest for a model that does not serve the task,
        Unavailable when the server cannot tell.
        """
        found = self._match(model, task)
        if found is None and time.monotonic() - self._refreshed_at > _REFRESH_INTERVAL_S:
            await self.refresh()
            found = self._match(model, task)
        if found is None:
            raise self._unknown(model, task)
        if task is not None and task not in found.tasks:
            raise BadRequest(
                f"the model {found.served_model_name} does not serve {task}; it serves "
                f"{', '.join(sorted(found.tasks))}",
                param="model",
            )
        return found

    def _match(self, model: str | None, task: Task | None) -> Pipeline | None:
        if not model:
            return next((p for p in self._pipelines if task is None or task in p.tasks), None)
        return next((p for p in self._pipelines if model in (p.served_model_name, p.name)), None)

    def _unknown(self, model: str | None, task: Task | None) -> UnknownModel | Unavailable:
        if not self._pipelines:
            return Unavailable("no model is loaded yet; try again in a while")
        names = ", ".join(p.served_model_name for p in self._pipelines)
        if not model:
            return UnknownModel(
                f"no model here serves {task}; there are: {names}", param="model", code="model_not_found"
            )
        return UnknownModel(
            f"the model {model!r} does not exist here; there are: {names}",
            param="model",
            code="model_not_found",
        )
