"""Adds, replaces and removes models of a server that runs, while it serves.

New weights are loaded beside the old ones, under entries of the next generation, and asked once by an
ensemble that nobody else knows. Then the model's own ensemble is made to name them: the server exchanges it
as a whole, so that no request passes old and new stages. At last the old entries are unloaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as server_client
from tritonclient.utils import InferenceServerException

from backends.contract import TEXT, PipelineSpec, RequestParameter, multimodal_name
from backends.repository.generation import (
    delete_entries,
    ensembles_of,
    exchange_ensembles,
    next_generation,
    restore_ensembles,
    stage_entries,
    write_stages,
)
from backends.repository.writer import entries_of, list_pipelines
from triton_embeddings import models
from triton_embeddings.addresses import LOOPBACK
from triton_embeddings.errors import CommandError
from triton_embeddings.serving_note import repository_of

# Weights of gigabytes come from a slow disk.
_LOAD_TIMEOUT_S = 1800.0
_ASK_TIMEOUT_S = 60.0


class LiveServer:
    """A tritonserver on this machine, and the model repository that it looks at."""

    def __init__(self, grpc_port: int, repository: Path | None) -> None:
        """Without a repository, the one that `serve` said it has."""
        self.address = f"{LOOPBACK}:{grpc_port}"
        self.repository = repository or repository_of(grpc_port)
        self._client = server_client.InferenceServerClient(self.address)

    def __enter__(self) -> LiveServer:
        try:
            self._client.get_server_metadata(client_timeout=_ASK_TIMEOUT_S)
        except InferenceServerException as error:
            raise CommandError(
                f"no tritonserver answers at {self.address}; start it with triton-embeddings serve, or say "
                "which port it has with --grpc-port"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def add(self, checkpoint: str, name: str | None, options: Mapping[str, Any]) -> tuple[PipelineSpec, bool]:
        """Serves a checkpoint, in place of the model of that name if there is one; whether there was.

        Raises BackendError, CommandError or KeyboardInterrupt, and then everything is as it was, unless the
        message says that the new weights serve already.
        """
        with _alone(self.repository):
            pipeline = models.plan_new(self.repository, checkpoint, name, options)
            generation = next_generation(self.repository, pipeline.name)
            pipeline = dataclasses.replace(pipeline, generation=generation)
            old = stage_entries(self.repository, pipeline.name)
            *stages, trial = write_stages(self.repository, pipeline)
            try:
                # With all its stages, at once; had they been loaded one by one, it would load them anew.
                self._load(trial)
                self._ask(trial)
                self._exchange(pipeline)
            except BaseException:
                self._take_away([trial, *stages])
                raise
            try:
                self._take_away([trial, *old])
            except KeyboardInterrupt:
                self._take_away([trial, *old])
                raise CommandError("interrupted when the new weights served already; they go on") from None
            return pipeline, bool(old)

    def remove(self, name: str) -> None:
        """Raises CommandError when there is no such model."""
        with _alone(self.repository):
            known = [entry.name for entry in list_pipelines(self.repository)]
            if name not in known:
                names = ", ".join(known) or "nothing"
                raise CommandError(f"{self.repository} has no model {name!r}; it holds {names}")
            stages = stage_entries(self.repository, name)
            own = entries_of(self.repository, name)
            ensembles = [entry for entry in (name, multimodal_name(name)) if entry in own - set(stages)]
            # The ensemble and its stages in one call: gateways take a model that lacks some of its stages for
            # one to mend.
            for entry in reversed(ensembles):
                self._unload(entry, with_stages=entry == name)
            self._take_away([*ensembles, *stages])

    def _exchange(self, pipeline: PipelineSpec) -> None:
        before = exchange_ensembles(self.repository, pipeline)
        try:
            for entry in ensembles_of(pipeline):
                self._load(entry)
        except BaseException:
            # The stages that it names now are about to go.
            restore_ensembles(self.repository, before)
            for path, text in before.items():
                if text is not None:
                    self._load(path.split("/")[0])
            raise

    def _load(self, entry: str) -> None:
        try:
            self._client.load_model(entry, client_timeout=_LOAD_TIMEOUT_S)
        except InferenceServerException as error:
            raise CommandError(
                f"{entry} cannot be loaded, so everything stays as it was: {_reason(error)}"
            ) from error

    def _ask(self, trial: str) -> None:
        """One inference of all heads."""
        text = server_client.InferInput(TEXT, [1, 1], "BYTES")
        text.set_data_from_numpy(np.array([[b"ready?"]], object))
        try:
            self._client.infer(
                trial,
                [text],
                parameters={RequestParameter.TRUNCATION: "right"},
                client_timeout=_LOAD_TIMEOUT_S,
            )
        except InferenceServerException as error:
            raise CommandError(
                f"the new model is loaded but fails, so everything stays as it was: {_reason(error)}"
            ) from error

    def _take_away(self, entries: Sequence[str]) -> None:
        """Unloads and deletes entries that nobody names any more."""
        for entry in entries:
            self._unload(entry)
        delete_entries(self.repository, list(entries))

    def _unload(self, entry: str, *, with_stages: bool = False) -> None:
        # One that was never loaded is no fault. The server does one thing after the other: after Ctrl-C it
        # has to end the loading first.
        with contextlib.suppress(InferenceServerException):
            self._client.unload_model(entry, unload_dependents=with_stages, client_timeout=_LOAD_TIMEOUT_S)


@contextlib.contextmanager
def interruptible(outcome: str) -> Iterator[None]:
    """In here SIGTERM is Ctrl-C, so that what was begun is undone; a second one does not end the undoing.

    Raises CommandError with the outcome.
    """

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        raise CommandError(f"interrupted; {outcome}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(error: InferenceServerException) -> str:
    """The message inside what the server makes of it."""
    first = (error.message() or str(error)).strip().split("\n")[0]
    return first.rpartition("TritonModelException: ")[2] or first


@contextlib.contextmanager
def _alone(repository: Path) -> Iterator[None]:
    """Raises CommandError while another command changes the same repository."""
    if not repository.is_dir():
        raise CommandError(f"{repository} is no folder; say where the models' entries lie")
    descriptor = os.open(repository, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise CommandError(
            f"another command changes {repository} at this moment; try again when it is done"
        ) from error
    finally:
        os.close(descriptor)
