"""What the commands do to a model repository."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import backends
from backends.checkpoint import Checkpoint
from backends.contract import PipelineParameter, PipelineSpec
from backends.errors import BackendError
from backends.options import ServingOptions
from backends.repository.pipeline import build_pipeline
from backends.repository.writer import Entry, list_pipelines, write
from backends.source import default_name, reference_of, resolve
from triton_embeddings.errors import CommandError

logger = logging.getLogger(__name__)


def default_repository() -> Path:
    """The checkout's model_repository, from whatever folder it is called; without a checkout, the one
    right here.
    """
    checkout = Path(backends.__file__).resolve().parent.parent / "model_repository"
    return checkout if checkout.is_dir() else Path("model_repository")


def plan(
    reference: str, name: str, options: ServingOptions, max_context_batch_size: int | None = None
) -> PipelineSpec:
    """The entries of a checkpoint. Raises BackendError when it cannot be served.

    `max_context_batch_size` is RTP-LLM's way to say max_batch_tokens: so many texts of the greatest length.
    """
    checkpoint = Checkpoint.read(resolve(reference), options.max_length, options.rerank_prompt)
    if max_context_batch_size is not None:
        tokens = max_context_batch_size * checkpoint.max_length
        options = dataclasses.replace(options, max_batch_tokens=tokens)
    pipeline = build_pipeline(name, reference, checkpoint, options)
    for note in pipeline.notes:
        logger.warning("note on %s: %s", name, note)
    return pipeline


def add(repository: Path, checkpoint: str, name: str | None, options: Mapping[str, Any]) -> PipelineSpec:
    """Writes the entries of a checkpoint. Raises BackendError, or CommandError for a name that is taken."""
    pipeline = plan_new(repository, checkpoint, name, options)
    write(repository, pipeline)
    return pipeline


def plan_new(repository: Path, checkpoint: str, name: str | None, options: Mapping[str, Any]) -> PipelineSpec:
    """The entries that would be written. Raises as `add` does."""
    given = dict(options)
    batch = given.pop("max_context_batch_size", None)
    pipeline = plan(
        reference_of(checkpoint), name or default_name(checkpoint), ServingOptions(**given), batch
    )
    served = pipeline.parameters[PipelineParameter.SERVED_MODEL_NAME]
    for entry in list_pipelines(repository):
        if entry.name != pipeline.name and served in (entry.name, entry.served_model_name):
            raise CommandError(f"the model {entry.name} is served as {served!r} already; give another name")
    return pipeline


@contextmanager
def _naming(entry: Entry) -> Iterator[None]:
    """Errors inside begin with the model's name."""
    try:
        yield
    except BackendError as error:
        raise CommandError(f"the model {entry.name}: {error}") from error


@contextmanager
def served_repository(
    repository: Path, checkpoints: Sequence[str], options: Mapping[str, Any], scratch: Path
) -> Iterator[Path]:
    """The repository to point the server at, every checkpoint in it looked at once.

    Given checkpoints are served alone, from entries in `scratch`, which is deleted afterwards; so are the
    repository's own models when options are given, which then win over those that they were added with.
    Raises BackendError or CommandError.
    """
    if checkpoints and len({default_name(c) for c in checkpoints}) < len(checkpoints):
        raise CommandError(
            "two of the checkpoints have the same name; give them names with: triton-embeddings add"
        )
    entries = [] if checkpoints else list_pipelines(repository)
    if not checkpoints and not entries:
        raise CommandError(
            f"{repository.resolve()} has no models; add one with: triton-embeddings add CHECKPOINT"
        )
    if len(checkpoints) + len(entries) > 1 and options.get("served_model_name"):
        raise CommandError(
            "--served-model-name names one model, but there are several; give it to triton-embeddings add"
        )
    if entries and not options:
        for folder in repository.iterdir():
            if folder.is_dir() and not (folder / "config.pbtxt").is_file():
                raise CommandError(
                    f"{folder.resolve()} has no config.pbtxt, so tritonserver would not start; delete it"
                )
        for entry in entries:
            with _naming(entry):
                plan(entry.checkpoint, entry.name, entry.options)
        yield repository
        return
    # Process ids come back, in a container at every start: what a killed process left here is not ours.
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        for checkpoint in checkpoints:
            add(scratch, checkpoint, None, options)
        for entry in entries:
            given = dict(options)
            batch = given.pop("max_context_batch_size", None)
            write(
                scratch,
                plan(entry.checkpoint, entry.name, dataclasses.replace(entry.options, **given), batch),
            )
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
