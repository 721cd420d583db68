"""The tokens stage."""

from backends.stages.tokens import TokensStage as TritonPythonModel

__all__ = ["TritonPythonModel"]
