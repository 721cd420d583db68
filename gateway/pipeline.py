"""A model as the server describes it, in the parameters of its ensemble."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from backends.contract import (
    ENCODER_TIMES,
    PipelineParameter,
    Task,
    entry_name,
    multimodal_name,
    stage_of,
)

# How the reference of a checkpoint of the hub begins, before its id and its commit.
_HUB = "hub:"


@dataclass(frozen=True)
class Pipeline:
    """A model as the server describes it."""

    name: str
    """The ensemble's name."""
    served_model_name: str
    """The name that clients use."""
    tasks: frozenset[Task]
    family: str
    dimensions: int | None
    """Components of a dense embedding; None where there is none, or where only the model knows."""
    max_length: int
    """Tokens of one text."""
    max_batch_size: int
    """Texts of one server request."""
    max_batch_tokens: int
    """Tokens of one forward pass of the encoder."""
    has_roles: bool = False
    """Whether queries and documents are encoded differently."""
    checkpoint: str = ""
    """Where it comes from."""
    pooling: str = ""
    """How a dense embedding is made of its tokens."""
    dtype: str = "auto"
    truncation: str = "error"
    """What happens to a text over the limit when the request does not say."""
    takes_instructions: bool = False
    """Whether it was made for instructions."""
    has_role_prompts: bool = False
    """Whether the checkpoint has prompts of its own for queries or documents."""
    matryoshka_dimensions: tuple[int, ...] = ()
    """The sizes that an embedding may be cut to, where the checkpoint lists them."""
    labels: tuple[str, ...] = ()
    """Of a reranker or classifier."""
    score_activation: str = "identity"
    score_is_probability: bool = False
    """Whether the model's makers give a probability, not a logit."""
    label_activation: str = "identity"
    takes_images: bool = False
    """Whether it has a second ensemble, for items with images."""
    fuses: bool = False
    """Whether one item may hold a text and images, or several images."""
    max_image_tokens: int = 0
    """Tokens that one image takes at most."""
    chat_template: str = ""
    """The name of the prompt that its items stand in."""
    tells_times: bool = False
    """Whether its stages tell when they had a request; entries of an earlier version do not."""
    steps: tuple[str, ...] = ()
    """The entries of its stages, as its ensembles name them."""
    image_steps: tuple[str, ...] = ()
    """Of these, the ones that only items with images need."""

    @property
    def ensembles(self) -> dict[str, tuple[str, ...]]:
        """The entries that take its requests, each with the entries that it needs."""
        texts = tuple(step for step in self.steps if step not in self.image_steps)
        images = {multimodal_name(self.name): self.steps} if self.image_steps else {}
        return {self.name: texts, **images}

    def ensemble_of(self, entry: str) -> str:
        """Of its ensembles the one that tells whether an entry answers: an ensemble, or a stage's."""
        own = (name for name, steps in self.ensembles.items() if entry == name or entry in steps)
        return next(own, self.name)

    def entry(self, stage: str) -> str:
        """The entry of one of its stages."""
        own = (step for step in self.steps if stage_of(self.name, step) == stage)
        return next(own, entry_name(self.name, stage))

    @property
    def other_names(self) -> frozenset[str]:
        """What clients may call it besides its own names: the hub's id or the folder that it comes from, and
        its prompt. The examples of SGLang's documentation do the first and the last.
        """
        origin = self.checkpoint
        if origin.startswith(_HUB):
            origin = origin.removeprefix(_HUB).split("@")[0]
        return frozenset({origin, self.chat_template}) - {""}


def read_pipeline(config: Any, others: Iterable[Any] = ()) -> Pipeline:
    """The server's ModelConfig of a pipeline's ensemble, and of others over its stages -> what it says."""
    texts, images = _steps([config]), _steps(others)
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    dimensions = parameters.get(PipelineParameter.DIMENSIONS)
    return Pipeline(
        name=config.name,
        served_model_name=parameters.get(PipelineParameter.SERVED_MODEL_NAME, config.name),
        tasks=frozenset(Task(task) for task in parameters[PipelineParameter.TASKS].split(",")),
        family=parameters.get(PipelineParameter.FAMILY, ""),
        dimensions=None if dimensions is None else int(dimensions),
        max_length=int(parameters[PipelineParameter.MAX_LENGTH]),
        max_batch_size=config.max_batch_size,
        max_batch_tokens=int(parameters[PipelineParameter.MAX_BATCH_TOKENS]),
        has_roles=parameters.get(PipelineParameter.ROLES) == "true",
        checkpoint=parameters.get(PipelineParameter.CHECKPOINT, ""),
        pooling=parameters.get(PipelineParameter.POOLING, ""),
        dtype=parameters.get(PipelineParameter.DTYPE, "auto"),
        truncation=parameters.get(PipelineParameter.TRUNCATION, "error"),
        takes_instructions=parameters.get(PipelineParameter.INSTRUCTIONS) == "true",
        has_role_prompts=parameters.get(PipelineParameter.ROLE_PROMPTS) == "true",
        matryoshka_dimensions=tuple(
            map(int, filter(None, parameters.get(PipelineParameter.MATRYOSHKA_DIMENSIONS, "").split(",")))
        ),
        labels=tuple(json.loads(parameters.get(PipelineParameter.LABELS, "[]"))),
        score_is_probability=parameters.get(PipelineParameter.SCORE_IS_PROBABILITY) == "true",
        score_activation=parameters.get(PipelineParameter.SCORE_ACTIVATION, "identity"),
        label_activation=parameters.get(PipelineParameter.LABEL_ACTIVATION, "identity"),
        takes_images="image" in parameters.get(PipelineParameter.MODALITIES, "text").split(","),
        fuses=parameters.get(PipelineParameter.FUSES) == "true",
        max_image_tokens=int(parameters.get(PipelineParameter.MAX_IMAGE_TOKENS, 0)),
        chat_template=parameters.get(PipelineParameter.CHAT_TEMPLATE, ""),
        tells_times=any(output.name == ENCODER_TIMES for output in config.output),
        steps=tuple(dict.fromkeys([*texts, *images])),
        image_steps=tuple(step for step in images if step not in texts),
    )


def _steps(ensembles: Iterable[Any]) -> list[str]:
    steps = (step.model_name for one in ensembles for step in one.ensemble_scheduling.step)
    return list(dict.fromkeys(steps))
