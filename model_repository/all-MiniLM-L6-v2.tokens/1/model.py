"""The tokens stage."""

import gc

gc.disable()  # Until the stage is loaded: Stage.initialize() enables it.

from backends.stages.tokens import TokensStage as TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
