"""How a person wants a checkpoint served, and the same as string parameters of a config.pbtxt."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backends.chat_prompt import CHAT_PROMPTS
from backends.contract import TRUNCATIONS
from backends.errors import OptionError

WIRE_DTYPES = {"auto": "FP32", "float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}
"""The data type in which hidden states travel to the heads, by the option dtype. What `auto` computes in
depends on the machine, but an entry must mean the same on every machine, so it travels in the widest one."""

IMAGE_POSITIONS = ("mrope", "plain")
QUANTIZATIONS = ("auto", "none", "float16", "int8")
RERANK_PROMPTS = ("none", "qwen3", "bge-gemma", "mxbai", "chat-template")
_COUNTS = (
    "max_batch_tokens",
    "max_batch_size",
    "max_length",
    "threads",
    "instances",
    "min_image_tokens",
    "max_image_tokens",
)
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class ServingOptions:
    """Options of one checkpoint. Raises OptionError for a value that cannot be used."""

    dtype: str = "auto"
    """Of weights and activations.

    auto: bfloat16 where the processor or GPU has it in hardware, else float32.
    """
    quantization: str = "auto"
    """Of the encoder's products on a CPU: none, float16 for their weights, or int8 for all, which is less
    exact. auto: float16 where dtype is auto too and comes to float32 on a CPU.
    """
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: a GPU where there is one."""
    max_batch_tokens: int = 16384
    """Tokens in one forward pass; a single longer text still runs, alone."""
    max_batch_size: int = 64
    """Items in one server request, and requests in one batch of a stage."""
    max_length: int | None = None
    """Tokens of one text, special tokens included; None is the checkpoint's own limit."""
    truncation: str = "error"
    """What happens to a text over max_length when the request does not say: error, right or left."""
    threads: int | None = None
    """CPU threads of the encoder; None is one for each core that the process may use."""
    instances: int = 1
    """Processes of the encoder."""
    served_model_name: str | None = None
    """The model's name in the HTTP API; None is the pipeline's own name."""
    task: str | None = None
    """What the checkpoint is for, where it does not say itself."""
    model_type: str | None = None
    """The architecture, where config.json does not name it."""
    causal: bool | None = None
    """Of a decoder, whether its tokens look only at those before them; None is what the checkpoint says."""
    rerank_prompt: str | None = None
    """What stands around the pairs of a reranker made of a language model: none, qwen3, bge-gemma, mxbai or
    chat-template; None is what the checkpoint tells."""
    share_prefix: bool = True
    """Of a causal decoder, whether what several texts of a batch begin with is computed once."""
    fuse_heads: bool = False
    """Whether the heads run inside the encoder's process: no hidden states travel to processes of their own,
    but the server leaves no head out for a request that does not ask for it. A head whose answer is as large
    as the hidden states (tokens) is then served only where `task` names it.
    """
    cuda_graphs: bool = False
    """On a GPU, whether small passes are captured as CUDA graphs. Off, for that has never run on a GPU."""
    chat_template: str | None = None
    """The prompt of a model of texts and images: gme-qwen2-vl or qwen3-vl-embedding; None is its family's."""
    image_positions: str = "mrope"
    """Of a model of texts and images, the positions of image tokens: mrope (time, height and width) or plain
    (as words, which GME's own code does)."""
    min_image_tokens: int | None = None
    """Tokens that one image takes at least, and at most; None is what its makers' own code says."""
    max_image_tokens: int | None = None
    trust_remote_code: bool = False
    """Whether code that a checkpoint brings may run."""

    def __post_init__(self) -> None:
        if self.dtype not in WIRE_DTYPES:
            raise OptionError(f"dtype is {self.dtype!r}; it takes one of {', '.join(WIRE_DTYPES)}")
        if self.quantization not in QUANTIZATIONS:
            raise OptionError(
                f"quantization is {self.quantization!r}; it takes one of {', '.join(QUANTIZATIONS)}"
            )
        if self.quantization not in ("auto", "none") and self.dtype not in ("auto", "float32"):
            raise OptionError(
                f"quantization {self.quantization} is for models in float32, but dtype is "
                f"{self.dtype!r}; leave one out"
            )
        if not _DEVICE.fullmatch(self.device):
            raise OptionError(f"device is {self.device!r}; it takes auto, cpu, cuda or cuda:N")
        if self.cuda_graphs and self.device == "cpu":
            raise OptionError("cuda_graphs is for a GPU, but device is 'cpu'; leave one out")
        if self.truncation not in TRUNCATIONS:
            raise OptionError(f"truncation is {self.truncation!r}; it takes one of {', '.join(TRUNCATIONS)}")
        if self.rerank_prompt not in (None, *RERANK_PROMPTS):
            raise OptionError(
                f"rerank_prompt is {self.rerank_prompt!r}; it takes one of {', '.join(RERANK_PROMPTS)}"
            )
        if self.chat_template not in (None, *CHAT_PROMPTS):
            raise OptionError(
                f"chat_template is {self.chat_template!r}; it takes one of {', '.join(CHAT_PROMPTS)}"
            )
        if self.image_positions not in IMAGE_POSITIONS:
            raise OptionError(
                f"image_positions is {self.image_positions!r}; it takes one of {', '.join(IMAGE_POSITIONS)}"
            )
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}; it takes a number of at least 1")

    def to_parameters(self) -> dict[str, str]:
        """Every option that differs from its default, as strings."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            f.name: str(values[f.name]).lower() if isinstance(values[f.name], bool) else str(values[f.name])
            for f in dataclasses.fields(self)
            if values[f.name] != f.default
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ServingOptions:
        """The options among the string parameters of an entry; other parameters are not looked at."""
        given: dict[str, Any] = {
            f.name: _parse(f.name, str(f.type), parameters[f.name])
            for f in dataclasses.fields(cls)
            if f.name in parameters
        }
        return cls(**given)


def _parse(name: str, kind: str, text: str) -> str | int | bool:
    if kind.startswith("int"):
        try:
            return int(text)
        except ValueError:
            raise OptionError(f"{name} is {text!r}; it takes a whole number") from None
    if kind.startswith("bool"):
        if text not in ("true", "false"):
            raise OptionError(f"{name} is {text!r}; it takes true or false")
        return text == "true"
    return text
