"""The tokenizer stage."""

from backends.stages.tokenizer import TokenizerStage as TritonPythonModel

__all__ = ["TritonPythonModel"]
