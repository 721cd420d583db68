"""What a family declares about its architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from backends.checkpoint import NO_LIMIT
from backends.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    import torch

    from backends.checkpoint import Checkpoint
    from backends.image_processing import ImageProcessor
    from backends.options import ServingOptions


INSTRUCT = "Instruct: {}\nQuery: "
"""What most embedding models that take an instruction put before a query."""


def from_zero(config: Mapping[str, Any]) -> int:
    """Positions begin at 0."""
    return 0


def after_padding(config: Mapping[str, Any]) -> int:
    """Positions begin behind the padding id (RoBERTa and its descendants)."""
    padding = config.get("pad_token_id")
    return (1 if padding is None else int(padding)) + 1


def refuse_other_positions(config: Mapping[str, Any]) -> None:
    """For families with learned positions: Jina's BERT v2 has the same names and another way (ALiBi).

    Raises CheckpointError.
    """
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise CheckpointError(
            f"config.json says position_embedding_type {kind!r}, which is not served; it takes 'absolute'"
        )


@dataclass(frozen=True)
class ImageTokens:
    """What stands for an image among the tokens of an item."""

    token: int
    """Its id, once for each vector of the image."""
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    merge: int = 1
    """So many by so many patches are one token."""
    is_item: bool = False
    """Whether an image is an item of its own, which takes one token whatever its size."""
    reserved: tuple[int, ...] = ()
    """Ids that a text must not hold."""

    def ids(self, grid: Sequence[int]) -> list[int]:
        """The ids of an image of so many patches along time, height and width."""
        count = 1 if self.is_item else grid[0] * grid[1] * grid[2] // self.merge**2
        return [*self.before, *[self.token] * count, *self.behind]

    def computed(self, grid: Sequence[int]) -> int:
        """Tokens that the model computes for an image that is an item: its patches, and one for the whole."""
        return grid[0] * grid[1] * grid[2] + 1


@dataclass(frozen=True)
class Vision:
    """What a family of texts and images declares besides."""

    processor: Callable[[Checkpoint, ServingOptions], ImageProcessor]
    """Makes pictures ready. Raises CheckpointError or OptionError. Needs no torch."""
    tokens: Callable[[Mapping[str, Any]], ImageTokens]
    """By config.json."""
    wrap: Callable[[Any, Checkpoint], torch.nn.Module]
    """transformers' model -> one that takes packed rows, and sees (backends.vision.Sees)."""
    chat_prompt: str | None = None
    """The prompt (backends.chat_prompt) of a checkpoint for which nobody gives another."""
    has_axes: bool = False
    """Whether images take positions in three axes (backends.mrope)."""
    is_told: Callable[[Checkpoint], bool] = lambda checkpoint: True
    """Whether a checkpoint says itself that it was trained with that prompt."""


@dataclass(frozen=True)
class Causality:
    """Whether tokens look only at those before them, and who says so."""

    is_causal: bool
    reason: str


@dataclass(frozen=True)
class Family:
    """A family is transformers' own model class and the few facts that packing needs to know about it."""

    name: str
    model_types: tuple[str, ...]
    """The values of config.json's model_type that belong to it."""
    other_names: tuple[str, ...] = ()
    """What RTP-LLM calls it."""
    is_decoder: bool = False
    """Whether it was made to write text: causal, unless a checkpoint or a person says otherwise."""
    bidirectional_names: tuple[str, ...] = ()
    """Those of other_names that say that its tokens look both ways."""
    own_causality: Callable[[Mapping[str, Any]], Causality | None] = lambda config: None
    """What config.json says of it besides an is_causal."""
    instruction: str | None = None
    """What stands before a query that has an instruction, where the checkpoint's own prompts do not
    show it.
    """
    last_token: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    """The token that belongs behind every text although the tokenizer's files do not say so."""
    has_token_types: bool = False
    """Whether forward takes token_type_ids."""
    position_offset: Callable[[Mapping[str, Any]], int] = from_zero
    """config.json -> the position of a sequence's first token."""
    load_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of from_pretrained besides the usual ones."""
    forward_arguments: Mapping[str, Any] = field(default_factory=dict)
    """The family's own keyword arguments of forward."""
    native_config: Callable[[Mapping[str, Any]], dict[str, Any] | None] = lambda config: None
    """A config.json that transformers would misread -> the arguments of its own configuration; None for one
    that it reads right. Raises CheckpointError for a value that would change the numbers.
    """
    adjust: Callable[[torch.nn.Module, Mapping[str, Any]], None] = lambda model, config: None
    """What is left to do to a loaded model, given config.json."""
    unsupported_dtypes: tuple[str, ...] = ()
    """Values of the option dtype with which the numbers overflow."""
    vision: Vision | None = None
    """Of a family that looks at images."""

    @property
    def call_arguments(self) -> dict[str, Any]:
        """Keyword arguments of forward besides the usual ones."""
        # A cache of keys and values would be built, copied and thrown away.
        return {**({"use_cache": False} if self.is_decoder else {}), **self.forward_arguments}

    @property
    def names(self) -> tuple[str, ...]:
        """All that the option model_type may call it."""
        return (self.name, *self.model_types, *self.other_names)

    def max_length(self, checkpoint: Checkpoint) -> int:
        """Tokens of one text that the checkpoint's limit and its positions allow."""
        return min(checkpoint.max_length, self.most_tokens(checkpoint))

    def most_tokens(self, checkpoint: Checkpoint) -> int:
        """Tokens of one text that the positions allow."""
        if checkpoint.positions is None:
            return NO_LIMIT
        return checkpoint.positions - self.position_offset(checkpoint.config)

    def tells_pairs_apart(self, config: Mapping[str, Any]) -> bool:
        """Whether the tokens of a pair's second text have another type than those of the first."""
        return self.has_token_types and int(config.get("type_vocab_size", 2)) > 1

    def causality(
        self, config: Mapping[str, Any], wanted: bool | None = None, model_type: str | None = None
    ) -> Causality | None:
        """Of a decoder, by the options `causal` and `model_type` and by config.json; None of an encoder.

        Raises OptionError where an encoder is to be causal, or not.
        """
        if not self.is_decoder:
            if wanted is not None:
                raise OptionError(
                    f"{self.name} models are encoders, whose tokens look both ways; leave --causal and "
                    "--no-causal out"
                )
            return None
        if wanted is not None:
            return Causality(wanted, "--causal" if wanted else "--no-causal")
        if model_type in self.bidirectional_names:
            return Causality(False, f"--model-type {model_type}")
        declared = config.get("is_causal")
        if isinstance(declared, bool):
            return Causality(declared, f"config.json says is_causal {str(declared).lower()}")
        return self.own_causality(config) or Causality(True, f"{self.name} models are")

    def load(
        self,
        checkpoint: Checkpoint,
        attention: str | None,
        dtype: torch.dtype,
        device: torch.device,
        causality: Causality | None = None,
    ) -> torch.nn.Module:
        """The encoder without any head, in evaluation mode, with the attention function of that name for
        texts.

        None as attention leaves the choice to transformers, None as causality to the checkpoint. Raises
        CheckpointError when weights are missing: they would be filled with random numbers.
        """
        # Imported here: it takes seconds, and what writes the repository's entries needs the facts above
        # only.
        import transformers

        # The heads of other tasks are left out on purpose, which transformers would report each time.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        config = self._make_config(checkpoint, causality or self.causality(checkpoint.config))
        is_cpu = device.type == "cpu"
        model, info = transformers.AutoModel.from_pretrained(
            checkpoint.transformer_path,
            attn_implementation=attention if self.vision is None else _of_texts(attention),
            # Tensors that are in that format in the file are mapped, not copied. Elsewhere than on a CPU they
            # stay as they are in the file until they are moved.
            dtype=dtype if is_cpu else "auto",
            local_files_only=True,
            # Every family is one of transformers' own classes, whatever code a checkpoint brings.
            trust_remote_code=False,
            output_loading_info=True,
            **({} if config is None else {"config": config}),
            **self.load_arguments,
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{checkpoint.transformer_path} lacks {len(missing)} weights of a {type(model).__name__}, "
                f"among them {missing[0]}; the download was cut short, or the checkpoint is of another model"
            )
        if not is_cpu:
            # One after the other: the host never holds a second copy of all of them. Buffers keep their
            # format (rotary frequencies are float32 in every model).
            for weight in model.parameters():
                weight.data = weight.data.to(device, dtype)
        model = model.to(device).eval()
        self.adjust(model, checkpoint.config)
        return model if self.vision is None else self.vision.wrap(model, checkpoint)

    def _make_config(self, checkpoint: Checkpoint, causality: Causality | None) -> Any:
        """For a config.json that transformers cannot read alone, and for decoders; None for all others."""
        import transformers

        if causality is not None:
            if checkpoint.model_type:
                config = transformers.AutoConfig.from_pretrained(
                    checkpoint.transformer_path, local_files_only=True, trust_remote_code=False
                )
            else:
                config = transformers.AutoConfig.for_model(self.model_types[0], **checkpoint.config)
            # Read by transformers' classes (5.2 and later), and handed on to the attention function.
            getattr(config, "text_config", config).is_causal = causality.is_causal
            return config
        native = self.native_config(checkpoint.config)
        if native is None and not checkpoint.model_type:
            native = dict(checkpoint.config)
        return None if native is None else transformers.AutoConfig.for_model(self.model_types[0], **native)


def _of_texts(attention: str | None) -> dict[str, str | None]:
    """An attention function for the language model; images go through torch's own, one after the other."""
    return {"": attention, "text_config": attention, "vision_config": "sdpa"}
