"""The encoder stage."""

from backends.stages.encoder import EncoderStage as TritonPythonModel

__all__ = ["TritonPythonModel"]
