"""The dense stage."""

from backends.stages.head import HeadStage as TritonPythonModel

__all__ = ["TritonPythonModel"]
