"""The tokenizer stage."""

import gc

from backends import lean_imports

# Until the stage is loaded: Stage.initialize() ends both.
gc.disable()
lean_imports.install()

from backends.stages.tokenizer import TokenizerStage as TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
