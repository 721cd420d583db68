"""The dense stage."""

import gc

gc.disable()  # Until the stage is loaded: Stage.initialize() enables it.

from backends.stages.head import HeadStage as TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
