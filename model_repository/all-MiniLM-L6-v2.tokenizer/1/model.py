"""The tokenizer stage."""

import gc

gc.disable()  # Until the stage is loaded: Stage.initialize() enables it.

from backends.stages.tokenizer import TokenizerStage as TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
