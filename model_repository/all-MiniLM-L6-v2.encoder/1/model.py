"""The encoder stage."""

import gc

gc.disable()  # Until the stage is loaded: Stage.initialize() enables it.

from backends.stages.encoder import EncoderStage as TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
