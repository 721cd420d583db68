"""The dense stage."""

import gc

from backends import lean_imports

# Until the stage is loaded: Stage.initialize() ends both.
gc.disable()
lean_imports.install()

from backends.stages.head import HeadStage as TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
