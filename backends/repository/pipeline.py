"""Checkpoint + options -> the specs of all its entries, with the wiring checked."""

from __future__ import annotations

import re
from dataclasses import replace

from backends.checkpoint import NO_LIMIT, Checkpoint
from backends.contract import (
    ACCOUNT_OUTPUTS,
    DECODED,
    ENCODER_TIMES,
    FIRST_LENGTH,
    HIDDEN,
    IMAGE,
    IMAGE_GRID,
    INPUT_IDS,
    IS_SPECIAL,
    KEY_LENGTH,
    LAST_HIDDEN,
    LENGTH,
    N_TOKENS,
    PATCHES,
    PROMPT_LENGTH,
    TEXT,
    TOKEN_SPANS,
    TOKEN_TEXTS,
    TOKENIZER_TIMES,
    TRUNCATED,
    PipelineParameter,
    PipelineSpec,
    StageSpec,
    TensorSpec,
)
from backends.errors import CheckpointError, OptionError
from backends.families import family_of
from backends.families.base import Causality, Family
from backends.heads import HEADS, encoder_inputs, head_inputs, late_interaction, only_row, takes_pairs
from backends.instruction import instruction_template
from backends.options import WIRE_DTYPES, ServingOptions
from backends.prompted_pairs import PromptedPairs
from backends.repository.multimodal import (
    chat_notes,
    check_image_options,
    check_room_for_images,
    image_facts,
    image_stage,
    seen_tensors,
)
from backends.rerank_prompt import is_language_model, rerank_prompt_of
from backends.tokenization import TextTokenizer
from backends.trust import check_trust

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Tensors with one value for each item of a request, or for each token, in one row: [1, n] or [1, t].
_ROWS = {
    name: TensorSpec(name, "INT32", (-1,), True)
    for name in (INPUT_IDS, LENGTH, PROMPT_LENGTH, KEY_LENGTH, FIRST_LENGTH)
}
_TEXT = TensorSpec(TEXT, "STRING", (-1,), True)
_IMAGE_GRID = TensorSpec(IMAGE_GRID, "INT32", (-1, 3), True, is_optional=True)


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
    if options.dtype in family.unsupported_dtypes:
        raise OptionError(
            f"{family.name} models overflow in {options.dtype}; give --dtype bfloat16 or float32"
        )
    # Told here rather than by a process that does not start.
    family.native_config(checkpoint.config)
    causality = family.causality(checkpoint.config, options.causal, options.model_type)
    most = family.most_tokens(checkpoint)
    if options.max_length is not None and options.max_length > most:
        raise OptionError(f"max_length is {options.max_length}; this model takes at most {most}")
    reasons = heads_of(checkpoint, options)
    heads = tuple(reasons)
    _check_prompt(checkpoint, options, family, heads)
    for head in heads:
        check_trust(checkpoint, head, options)
    check_image_options(checkpoint, options, family)
    check_room_for_images(checkpoint, options, family)
    seen = seen_tensors(checkpoint, options, family)
    stages = (
        _tokenizer(reference, options, heads, seen),
        _encoder(reference, checkpoint, options, family, heads, seen),
        *(_head(head, reference, checkpoint, options, heads) for head in heads if not options.fuse_heads),
    )
    outputs = _outputs(checkpoint, heads)
    told = (*ACCOUNT_OUTPUTS, TOKENIZER_TIMES, ENCODER_TIMES)
    account = tuple(spec for stage in stages for spec in stage.outputs if spec.name in told)
    pipeline = PipelineSpec(
        name=name,
        max_batch_size=options.max_batch_size,
        inputs=(_TEXT,),
        outputs=(*outputs, *account),
        stages=stages,
        image_stage=image_stage(reference, options, seen) if seen else None,
        parameters=_describe(name, reference, checkpoint, options, family, heads),
        # The checkpoint's own are about pooling, which no other head does.
        notes=(
            *(checkpoint.notes if "dense" in heads else ()),
            *_causality_notes(causality),
            *_guess_notes(checkpoint, options, heads),
            *chat_notes(checkpoint, options, family),
        ),
        reasons=reasons,
    )
    check_wiring(pipeline)
    return pipeline


def _check_prompt(
    checkpoint: Checkpoint, options: ServingOptions, family: Family, heads: tuple[str, ...]
) -> None:
    """Raises OptionError for a prompt that nothing is put into, and for a limit that it fills."""
    if options.rerank_prompt is not None and not takes_pairs(heads):
        raise OptionError(
            f"--rerank-prompt is for rerankers, and {checkpoint.path} is served as {', '.join(heads)}; leave "
            "it out, or give --task score"
        )
    prompt = rerank_prompt_of(checkpoint) if takes_pairs(heads) else None
    if prompt is not None and options.max_length is not None:
        PromptedPairs(TextTokenizer(checkpoint, family.max_length(checkpoint)), prompt)


def _guess_notes(checkpoint: Checkpoint, options: ServingOptions, heads: tuple[str, ...]) -> tuple[str, ...]:
    """Of a language model that nobody has called a reranker."""
    is_told = options.task is not None or options.rerank_prompt is not None or checkpoint.has_modules
    if is_told or "logits" not in heads or not is_language_model(checkpoint):
        return ()
    return ("it is taken for a reranker; if it is an embedding model, give --task embed",)


def _causality_notes(causality: Causality | None) -> tuple[str, ...]:
    """Of a decoder that looks both ways: nothing in its embeddings would show that it should not."""
    if causality is None or causality.is_causal:
        return ()
    return (f"its tokens look both ways: {causality.reason}",)


def heads_of(checkpoint: Checkpoint, options: ServingOptions) -> dict[str, str]:
    """The heads that a checkpoint is served with, and why: those of the task that a person gives, or what it
    is made for.

    Raises OptionError for a task that is not served, CheckpointError for a checkpoint made for such a task.
    """
    if options.task is not None:
        wanted = options.task.lower().replace("-", "_")
        heads = {name: f"--task {options.task}" for name, head in HEADS.items() if wanted in head.task_names}
        if not heads:
            known = dict.fromkeys(word for head in HEADS.values() for word in head.task_names)
            raise OptionError(f"task is {options.task!r}; it takes {', '.join(known)}")
        for name in heads:
            HEADS[name].check_task_name(checkpoint, wanted)
        return heads
    found = {name: head.reason(checkpoint) for name, head in HEADS.items()}
    reasons = {name: reason for name, reason in found.items() if reason is not None}
    if not reasons:
        raise CheckpointError(
            f"{checkpoint.path} is made for a task that is not served yet ({checkpoint.architecture}, "
            f"{checkpoint.sentence_model_type}); --task embed serves its encoder as an embedding "
            "model all the same"
        )
    return _without_bulky(reasons) if options.fuse_heads else reasons


def _without_bulky(reasons: dict[str, str]) -> dict[str, str]:
    """The server (2.51) asks a step for all outputs that its ensemble maps, whatever the client asked for: a
    fused head runs for every request.
    """
    return {name: reason for name, reason in reasons.items() if not HEADS[name].is_bulky} or reasons


def check_wiring(pipeline: PipelineSpec) -> None:
    """Every input of a step is made by an earlier one with the same type, and outputs are leaves; of both
    ensembles, where there are two.

    The server (2.51) loads an ensemble with an output that a step reads too, and then fails every request
    that asks for some of the outputs only. Raises ValueError.
    """
    _check_steps(pipeline, pipeline.inputs, pipeline.stages)
    if pipeline.image_stage is not None:
        inputs = (*pipeline.inputs, TensorSpec(IMAGE, "STRING", (-1,), True))
        # Patches come from the image stage, and the tokenizer's are not joined to anything.
        tokenizer, *others = pipeline.stages
        outputs = tuple(spec for spec in tokenizer.outputs if spec.name != PATCHES)
        stages = (pipeline.image_stage, replace(tokenizer, outputs=outputs), *others)
        _check_steps(pipeline, inputs, stages)


def _check_steps(
    pipeline: PipelineSpec, inputs: tuple[TensorSpec, ...], stages: tuple[StageSpec, ...]
) -> None:
    made = {spec.name: spec for spec in inputs}
    read = set()
    for stage in stages:
        for spec in stage.inputs:
            source = made.get(spec.name)
            if source is None and spec.is_optional:
                continue
            if source is None or source.dtype != spec.dtype:
                raise ValueError(
                    f"{pipeline.name}: {stage.stage} reads {spec.name} {spec.dtype}, which no step "
                    "before it makes"
                )
            read.add(spec.name)
        wanted = {*read, *(spec.name for spec in pipeline.outputs)}
        for spec in stage.outputs:
            if spec.name in made and spec.name in wanted:
                raise ValueError(
                    f"{pipeline.name}: {spec.name} is made by two steps, {stage.stage} among them"
                )
            made[spec.name] = spec
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
        PipelineParameter.TASKS: ",".join(task for head in heads for task in HEADS[head].tasks(checkpoint)),
        PipelineParameter.FAMILY: family.name,
        PipelineParameter.CHECKPOINT: reference,
        PipelineParameter.SERVED_MODEL_NAME: options.served_model_name or name,
        PipelineParameter.MAX_LENGTH: str(_max_length(checkpoint, options, family, heads)),
        PipelineParameter.MAX_BATCH_TOKENS: str(options.max_batch_tokens),
        PipelineParameter.DTYPE: options.dtype,
        PipelineParameter.TRUNCATION: options.truncation,
    }
    described.update(image_facts(checkpoint, options, family))
    if any(checkpoint.role_prompts.values()):
        described[PipelineParameter.ROLE_PROMPTS] = "true"
    if _takes_instructions(checkpoint, family, heads):
        described[PipelineParameter.INSTRUCTIONS] = "true"
    for head in heads:
        described.update(HEADS[head].facts(checkpoint))
    return described


def _takes_instructions(checkpoint: Checkpoint, family: Family, heads: tuple[str, ...]) -> bool:
    if takes_pairs(heads):
        prompt = rerank_prompt_of(checkpoint)
        return prompt is not None and prompt.takes_instruction
    if family.vision is not None and family.vision.chat_prompt is not None:
        return True
    return instruction_template(checkpoint, family.instruction) is not None


def _tokenizer(
    reference: str, options: ServingOptions, heads: tuple[str, ...], seen: tuple[TensorSpec, ...]
) -> StageSpec:
    return StageSpec(
        stage="tokenizer",
        stage_class="backends.stages.tokenizer.TokenizerStage",
        inputs=(_TEXT, _IMAGE_GRID) if seen else (_TEXT,),
        outputs=(
            TensorSpec(INPUT_IDS, "INT32", (-1,)),
            TensorSpec(LENGTH, "INT32", (-1,)),
            TensorSpec(PROMPT_LENGTH, "INT32", (-1,)),
            TensorSpec(KEY_LENGTH, "INT32", (-1,)),
            TensorSpec(FIRST_LENGTH, "INT32", (-1,)),
            TensorSpec(N_TOKENS, "INT32", (1,)),
            TensorSpec(TRUNCATED, "BOOL", (1,)),
            TensorSpec(TOKENIZER_TIMES, "INT64", (2,)),
            # For who calls this entry directly.
            TensorSpec(TOKEN_TEXTS, "STRING", (-1,)),
            TensorSpec(TOKEN_SPANS, "INT32", (-1, 2)),
            TensorSpec(IS_SPECIAL, "BOOL", (-1,)),
            TensorSpec(DECODED, "STRING", (1,)),
            *(replace(spec, is_ragged=False) for spec in seen),
        ),
        parameters={"checkpoint": reference, "heads": ",".join(heads), **options.to_parameters()},
    )


def _encoder(
    reference: str,
    checkpoint: Checkpoint,
    options: ServingOptions,
    family: Family,
    heads: tuple[str, ...],
    seen: tuple[TensorSpec, ...],
) -> StageSpec:
    tells_apart = family.tells_pairs_apart(checkpoint.config)
    extra = encoder_inputs(checkpoint, heads, tells_pairs_apart=tells_apart)
    outputs: tuple[TensorSpec, ...] = (_hidden(checkpoint, options, heads),)
    if options.fuse_heads:
        extra = (*extra, *head_inputs(checkpoint, heads))
        outputs = _outputs(checkpoint, heads)
    names = dict.fromkeys((INPUT_IDS, LENGTH, *extra))
    return StageSpec(
        stage="encoder",
        stage_class="backends.stages.encoder.EncoderStage",
        inputs=(*(_ROWS[name] for name in names), *seen),
        outputs=(*outputs, TensorSpec(ENCODER_TIMES, "INT64", (3,))),
        parameters={"checkpoint": reference, "heads": ",".join(heads), **options.to_parameters()},
        device=options.device,
        instances=options.instances,
    )


def _outputs(checkpoint: Checkpoint, heads: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    """What the heads make."""
    return tuple(output for head in heads for output in HEADS[head].outputs(checkpoint))


def _head(
    head: str, reference: str, checkpoint: Checkpoint, options: ServingOptions, heads: tuple[str, ...]
) -> StageSpec:
    spec = HEADS[head]
    hidden = _hidden(checkpoint, options, heads)
    read: tuple[TensorSpec, ...] = (TensorSpec(hidden.name, hidden.dtype, hidden.dims, True),)
    parameters = {"checkpoint": reference, "head": head, **options.to_parameters()}
    if hidden.name == LAST_HIDDEN:
        parameters["reads"] = LAST_HIDDEN
    else:
        read = (*read, _ROWS[LENGTH], *(_ROWS[name] for name in spec.inputs(checkpoint)))
    return StageSpec(
        stage=head,
        stage_class=spec.stage_class,
        inputs=read,
        outputs=spec.outputs(checkpoint),
        parameters=parameters,
        device=options.device,
    )


def _max_length(
    checkpoint: Checkpoint, options: ServingOptions, family: Family, heads: tuple[str, ...]
) -> int:
    """Tokens of a text, or of a document where queries are shorter."""
    late = late_interaction(checkpoint, heads)
    own = family.max_length(checkpoint)
    most = min(family.most_tokens(checkpoint), options.max_length or NO_LIMIT)
    return own if late is None else min(late.lengths.get("document", own), most)


def _hidden(checkpoint: Checkpoint, options: ServingOptions, heads: tuple[str, ...]) -> TensorSpec:
    name = HIDDEN if only_row(checkpoint, heads) is None else LAST_HIDDEN
    return TensorSpec(name, WIRE_DTYPES[options.dtype], (-1, checkpoint.hidden_size))
