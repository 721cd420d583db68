"""Puts a pipeline's entries into a model repository, takes them out, and lists what is there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from backends.contract import PipelineParameter, PipelineSpec, entry_name, multimodal_name
from backends.errors import CheckpointError
from backends.options import ServingOptions
from backends.repository.pbtxt import ensemble_config, multimodal_config, parse, stage_config

# With the collector at work it takes a third longer to import torch and transformers, which leave it nothing.
_MODEL = '''"""{summary}"""

import gc

from backends import lean_imports

# Until the stage is loaded: Stage.initialize() ends both.
gc.disable()
lean_imports.install()

from {module} import {name} as TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class Entry:
    """A pipeline as its ensemble's config.pbtxt describes it."""

    name: str
    parameters: Mapping[str, str]
    options: ServingOptions

    @property
    def served_model_name(self) -> str:
        """The name that clients use."""
        return self.parameters[PipelineParameter.SERVED_MODEL_NAME]

    @property
    def checkpoint(self) -> str:
        """The checkpoint's reference (see backends.source)."""
        return self.parameters[PipelineParameter.CHECKPOINT]


def render(pipeline: PipelineSpec) -> dict[str, str]:
    """Path inside the repository -> text, of every file of a pipeline."""
    files = {
        f"{pipeline.name}/config.pbtxt": ensemble_config(pipeline),
        # The server wants a version folder, and git keeps no empty ones.
        f"{pipeline.name}/1/.gitkeep": "",
    }
    stages = pipeline.stages
    if pipeline.image_stage is not None:
        second = multimodal_name(pipeline.name)
        files[f"{second}/config.pbtxt"] = multimodal_config(pipeline)
        files[f"{second}/1/.gitkeep"] = ""
        stages = (*stages, pipeline.image_stage)
    for stage in stages:
        entry = entry_name(pipeline.name, stage.stage, pipeline.generation)
        module, _, name = stage.stage_class.rpartition(".")
        files[f"{entry}/config.pbtxt"] = stage_config(pipeline, stage)
        files[f"{entry}/1/model.py"] = _MODEL.format(
            summary=f"The {stage.stage} stage.", module=module, name=name
        )
    return files


def write(repository: Path, pipeline: PipelineSpec) -> None:
    """Writes all entries of a pipeline, in place of those that it had before.

    They are made in a folder beside their place and moved there whole, the ensemble last: a server that looks
    in between finds a pipeline complete or not at all.
    """
    repository.mkdir(parents=True, exist_ok=True)
    files = render(pipeline)
    new = {path.split("/")[0] for path in files}
    old = entries_of(repository, pipeline.name)
    for entry in sorted(new - old):
        if (repository / entry).exists():
            raise CheckpointError(
                f"{repository / entry} is in the way and is not of this model; give another name"
            )
    # Beside the repository, where a server that scans it does not see a half-written entry.
    with tempfile.TemporaryDirectory(prefix=f".{pipeline.name}-", dir=repository.parent) as folder:
        for path, text in files.items():
            file = Path(folder) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        for entry in old:
            shutil.rmtree(repository / entry)
        ensembles = (multimodal_name(pipeline.name), pipeline.name)
        for entry in sorted(new, key=lambda entry: entry in ensembles and 1 + ensembles.index(entry)):
            shutil.move(Path(folder) / entry, repository / entry)


def entries_of(repository: Path, name: str) -> set[str]:
    """The folders of a pipeline that are there: the ensemble's and its steps'."""
    names: set[str] = set()
    for ensemble in (name, multimodal_name(name)):
        file = repository / ensemble / "config.pbtxt"
        if not file.is_file():
            break
        steps = parse(file.read_text(encoding="utf-8")).ensemble_scheduling.step
        own = {step.model_name for step in steps}
        # A model of somebody's that happens to have such a name has steps of its own.
        if ensemble != name and not own & names:
            break
        names |= {ensemble, *own} if steps else set()
    return {entry for entry in names if (repository / entry).is_dir()}


def remove(repository: Path, name: str) -> None:
    """Deletes the entries of a pipeline, the ensemble first.

    Raises CheckpointError when there is no such pipeline.
    """
    known = {entry.name: entry for entry in list_pipelines(repository)}
    if name not in known:
        names = ", ".join(known) or "nothing"
        raise CheckpointError(f"{repository} has no model {name!r}; it holds {names}")
    for entry in sorted(entries_of(repository, name), key=lambda entry: entry != name):
        shutil.rmtree(repository / entry)


def list_pipelines(repository: Path) -> list[Entry]:
    """The pipelines of a repository that this project wrote, by name.

    Raises CheckpointError for a broken config.pbtxt.
    """
    found = []
    for file in sorted(repository.glob("*/config.pbtxt")):
        try:
            config = parse(file.read_text(encoding="utf-8"))
        except (text_format.ParseError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}; write it anew with triton-embeddings add"
            ) from error
        if config.platform == "ensemble" and PipelineParameter.CHECKPOINT in config.parameters:
            parameters = {name: value.string_value for name, value in config.parameters.items()}
            found.append(Entry(file.parent.name, parameters, _options(repository, config)))
    return found


def _options(repository: Path, ensemble: Any) -> ServingOptions:
    """The options that a pipeline was written with, as its first stage has them."""
    file = repository / ensemble.ensemble_scheduling.step[0].model_name / "config.pbtxt"
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing; write the model {ensemble.name} anew with triton-embeddings add"
        )
    parameters = parse(file.read_text(encoding="utf-8")).parameters
    return ServingOptions.from_parameters({name: value.string_value for name, value in parameters.items()})
