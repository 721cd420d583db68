"""Changes of a model repository that a running server looks at: new entries beside the old ones, and one
file that is exchanged.

The order is the caller's: new stages are written and loaded, then the ensembles name them, then the old ones
are taken away.
"""

from __future__ import annotations

import py_compile
import shutil
import tempfile
from pathlib import Path

from backends.contract import PipelineSpec, generation_of, multimodal_name, stage_of
from backends.errors import CheckpointError
from backends.repository.pbtxt import trial_config, trial_name
from backends.repository.writer import entries_of, render


def ensembles_of(pipeline: PipelineSpec) -> list[str]:
    """The entries that clients ask for, the one that describes the model last."""
    second = [multimodal_name(pipeline.name)] if pipeline.image_stage is not None else []
    return [*second, pipeline.name]


def next_generation(repository: Path, name: str) -> int:
    """A generation that no entry of a pipeline has, whether it is in use or was left behind."""
    own = [generation_of(entry) for entry in stage_entries(repository, name)]
    return max(own, default=0) + 1


def stage_entries(repository: Path, name: str) -> list[str]:
    """All folders of a pipeline's stages, those that no ensemble names among them."""
    ensembles = (name, multimodal_name(name))
    used = {entry for entry in entries_of(repository, name) if entry not in ensembles}
    stages = {stage_of(name, entry) for entry in used} | {"trial"}
    folders = (path.name for path in repository.iterdir() if path.is_dir()) if repository.is_dir() else ()
    left = {
        entry
        for entry in folders
        if entry.startswith(f"{name}.") and stage_of(name, entry) in stages and generation_of(entry) > 1
    }
    return sorted(used | left)


def write_stages(repository: Path, pipeline: PipelineSpec) -> list[str]:
    """Writes the entries of a pipeline's stages, and one of a trial ensemble over them; their names, the
    trial last. Raises CheckpointError where one is there already.
    """
    files = {path: text for path, text in render(pipeline).items() if not _is_ensemble(pipeline, path)}
    trial = trial_name(pipeline)
    files[f"{trial}/config.pbtxt"] = trial_config(pipeline)
    files[f"{trial}/1/.gitkeep"] = ""
    entries = sorted({path.split("/")[0] for path in files}, key=lambda entry: (entry == trial, entry))
    for entry in entries:
        if (repository / entry).exists():
            raise CheckpointError(f"{repository / entry} is in the way; delete it, or give another name")
    repository.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{pipeline.name}-", dir=repository.parent) as folder:
        _write(Path(folder), files)
        for file in Path(folder).glob("*/1/*.py"):
            # Else the first import writes it there, and the server (2.51), which takes that for a change of
            # the entry, loads it once more at the next look.
            py_compile.compile(str(file), doraise=True)
        try:
            for entry in entries:
                shutil.move(Path(folder) / entry, repository / entry)
        except BaseException:
            delete_entries(repository, entries)
            raise
    return entries


def exchange_ensembles(repository: Path, pipeline: PipelineSpec) -> dict[str, str | None]:
    """Makes the ensembles name the pipeline's stages; what stood there before, by file, for
    `restore_ensembles`.
    """
    files = {path: text for path, text in render(pipeline).items() if _is_ensemble(pipeline, path)}
    before = {
        path: (repository / path).read_text(encoding="utf-8") if (repository / path).is_file() else None
        for path in files
    }
    _exchange(repository, files)
    return before


def restore_ensembles(repository: Path, before: dict[str, str | None]) -> None:
    """Undoes `exchange_ensembles`."""
    _exchange(repository, {path: text for path, text in before.items() if text is not None})
    delete_entries(repository, [path.split("/")[0] for path, text in before.items() if text is None])


def delete_entries(repository: Path, entries: list[str]) -> None:
    """Deletes folders that the server has unloaded."""
    for entry in entries:
        shutil.rmtree(repository / entry, ignore_errors=True)


def _is_ensemble(pipeline: PipelineSpec, path: str) -> bool:
    return path.split("/")[0] in ensembles_of(pipeline)


def _exchange(repository: Path, files: dict[str, str]) -> None:
    """Each file at once: whoever reads it finds the old text or the new."""
    with tempfile.TemporaryDirectory(prefix=".exchange-", dir=repository.parent) as folder:
        _write(Path(folder), files)
        for path in files:
            (repository / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).replace(repository / path)


def _write(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
