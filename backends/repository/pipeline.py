"""Checkpoint + options -> the specs of all its entries, with the wiring checked."""

from __future__ import annotations

import re

from backends.checkpoint import Checkpoint
from backends.contract import (
    ACCOUNT_OUTPUTS,
    HIDDEN,
    INPUT_IDS,
    LENGTH,
    N_TOKENS,
    PROMPT_LENGTH,
    TEXT,
    TRUNCATED,
    PipelineParameter,
    PipelineSpec,
    StageSpec,
    TensorSpec,
)
from backends.errors import CheckpointError, OptionError
from backends.families import family_of
from backends.families.base import Family
from backends.heads import HEADS
from backends.options import WIRE_DTYPES, ServingOptions

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Tensors with one value for each item of a request, in one row: [1, n].
_PER_ITEM = {
    LENGTH: TensorSpec(LENGTH, "INT32", (-1,), True),
    PROMPT_LENGTH: TensorSpec(PROMPT_LENGTH, "INT32", (-1,), True),
}
_TEXT = TensorSpec(TEXT, "STRING", (-1,), True)


def build_pipeline(
    name: str, reference: str, checkpoint: Checkpoint, options: ServingOptions
) -> PipelineSpec:
    """The entries that serve a checkpoint under a name. Raises CheckpointError or OptionError."""
    if not _NAME.fullmatch(name):
        raise OptionError(
            f"the name {name!r} cannot be used; give one of letters, digits, '.', '_' and '-' with --name "
            "(--served-model-name takes any)"
        )
    family = family_of(checkpoint, options.model_type)
    heads = heads_of(checkpoint, options)
    stages = (
        _tokenizer(reference, options),
        _encoder(reference, checkpoint, options),
        *(_head(head, reference, checkpoint, options) for head in heads),
    )
    outputs = tuple(output for head in heads for output in HEADS[head].outputs(checkpoint))
    account = tuple(spec for spec in stages[0].outputs if spec.name in ACCOUNT_OUTPUTS)
    pipeline = PipelineSpec(
        name=name,
        max_batch_size=options.max_batch_size,
        inputs=(_TEXT,),
        outputs=(*outputs, *account),
        stages=stages,
        parameters=_describe(name, reference, checkpoint, options, family, heads),
        notes=checkpoint.notes,
    )
    check_wiring(pipeline)
    return pipeline


def heads_of(checkpoint: Checkpoint, options: ServingOptions) -> tuple[str, ...]:
    """The heads that a checkpoint is served with: those of the task that a person gives, or what it is made
    for.

    Raises OptionError for a task that is not served, CheckpointError for a checkpoint made for such a task.
    """
    if options.task is not None:
        wanted = options.task.lower().replace("-", "_")
        heads = tuple(name for name, head in HEADS.items() if wanted in (head.task, *head.task_names))
        if not heads:
            known = ", ".join(word for head in HEADS.values() for word in (head.task, *head.task_names))
            raise OptionError(f"task is {options.task!r}; it takes {known}")
        return heads
    heads = tuple(name for name, head in HEADS.items() if head.is_default(checkpoint))
    if not heads:
        raise CheckpointError(
            f"{checkpoint.path} is made for a task that is not served yet ({checkpoint.architecture}, "
            f"{checkpoint.sentence_model_type}); --task embed serves its encoder as an embedding "
            "model all the same"
        )
    return heads


def check_wiring(pipeline: PipelineSpec) -> None:
    """Every input of a step is made by an earlier one with the same type, and outputs are leaves.

    The server (2.51) loads an ensemble with an output that a step reads too, and then fails every request
    that asks for some of the outputs only. Raises ValueError.
    """
    made = {spec.name: spec for spec in pipeline.inputs}
    read = set()
    for stage in pipeline.stages:
        for spec in stage.inputs:
            source = made.get(spec.name)
            if source is None or source.dtype != spec.dtype:
                raise ValueError(
                    f"{pipeline.name}: {stage.stage} reads {spec.name} {spec.dtype}, which no step "
                    "before it makes"
                )
            read.add(spec.name)
        made.update({spec.name: spec for spec in stage.outputs})
    for spec in pipeline.outputs:
        if spec.name in read or spec.name not in made:
            raise ValueError(
                f"{pipeline.name}: {spec.name} cannot be an output: it is read by a step, or made by none"
            )


def _describe(
    name: str,
    reference: str,
    checkpoint: Checkpoint,
    options: ServingOptions,
    family: Family,
    heads: tuple[str, ...],
) -> dict[str, str]:
    described: dict[str, str] = {
        PipelineParameter.TASKS: ",".join(HEADS[head].task for head in heads),
        PipelineParameter.FAMILY: family.name,
        PipelineParameter.CHECKPOINT: reference,
        PipelineParameter.SERVED_MODEL_NAME: options.served_model_name or name,
        PipelineParameter.MAX_LENGTH: str(family.max_length(checkpoint)),
        PipelineParameter.MAX_BATCH_TOKENS: str(options.max_batch_tokens),
    }
    for head in heads:
        described.update(HEADS[head].facts(checkpoint))
    return described


def _tokenizer(reference: str, options: ServingOptions) -> StageSpec:
    return StageSpec(
        stage="tokenizer",
        stage_class="backends.stages.tokenizer.TokenizerStage",
        inputs=(_TEXT,),
        outputs=(
            TensorSpec(INPUT_IDS, "INT32", (-1,)),
            TensorSpec(LENGTH, "INT32", (-1,)),
            TensorSpec(PROMPT_LENGTH, "INT32", (-1,)),
            TensorSpec(N_TOKENS, "INT32", (1,)),
            TensorSpec(TRUNCATED, "BOOL", (1,)),
        ),
        parameters={"checkpoint": reference, **options.to_parameters()},
    )


def _encoder(reference: str, checkpoint: Checkpoint, options: ServingOptions) -> StageSpec:
    return StageSpec(
        stage="encoder",
        stage_class="backends.stages.encoder.EncoderStage",
        inputs=(TensorSpec(INPUT_IDS, "INT32", (-1,), True), _PER_ITEM[LENGTH]),
        outputs=(_hidden(checkpoint, options),),
        parameters={"checkpoint": reference, **options.to_parameters()},
        device=options.device,
        instances=options.instances,
    )


def _head(head: str, reference: str, checkpoint: Checkpoint, options: ServingOptions) -> StageSpec:
    spec = HEADS[head]
    hidden = _hidden(checkpoint, options)
    extra = tuple(_PER_ITEM[name] for name in spec.inputs(checkpoint))
    return StageSpec(
        stage=head,
        stage_class="backends.stages.head.HeadStage",
        inputs=(TensorSpec(hidden.name, hidden.dtype, hidden.dims, True), _PER_ITEM[LENGTH], *extra),
        outputs=spec.outputs(checkpoint),
        parameters={"checkpoint": reference, "head": head, **options.to_parameters()},
        device=options.device,
    )


def _hidden(checkpoint: Checkpoint, options: ServingOptions) -> TensorSpec:
    return TensorSpec(HIDDEN, WIRE_DTYPES[options.dtype], (-1, checkpoint.hidden_size))
