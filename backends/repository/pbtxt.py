"""Specs -> the server's configuration protobuf -> the text of a config.pbtxt, and back to the protobuf."""

from __future__ import annotations

from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from backends.contract import (
    IMAGE,
    IMAGE_TIMES,
    PipelineSpec,
    StageSpec,
    TensorSpec,
    entry_name,
    multimodal_name,
)

_HEADER = "# Written by triton-embeddings; `triton-embeddings add` writes it anew.\n"
# Whether the Python backend copies all inputs to the host before a stage sees them; "yes" if nobody says.
_HOST_INPUTS = "FORCE_CPU_ONLY_INPUT_TENSORS"


def stage_config(pipeline: PipelineSpec, stage: StageSpec) -> str:
    """config.pbtxt of one stage."""
    config = _config(
        entry_name(pipeline.name, stage.stage, pipeline.generation),
        pipeline.max_batch_size,
        stage.inputs,
        stage.outputs,
    )
    config.backend = "python"
    # An empty dynamic_batching has no delay: a batch forms while the stage works on the one before, and a
    # delay would be paid at every stage (measured: 500 us cost a lone request 2.3 ms).
    config.dynamic_batching.SetInParent()
    group = config.instance_group.add(count=stage.instances)
    kinds = model_config_pb2.ModelInstanceGroup
    name, _, number = stage.device.partition(":")
    group.kind = {"cpu": kinds.KIND_CPU, "cuda": kinds.KIND_GPU, "auto": kinds.KIND_AUTO}[name]
    if number:
        group.gpus.append(int(number))
    parameters = dict(stage.parameters)
    if name != "cpu":
        # Tensors that are on a GPU stay there on their way to a stage on a GPU (python_backend's README).
        # Without a GPU the server logs it, and that is all.
        parameters[_HOST_INPUTS] = "no"
    _set_parameters(config, parameters)
    return _text(config)


def ensemble_config(pipeline: PipelineSpec) -> str:
    """config.pbtxt of the ensemble that chains the stages: equal names are joined, unread outputs
    left out.
    """
    config = _ensemble(pipeline, pipeline.name, pipeline.inputs, pipeline.outputs, pipeline.stages)
    _set_parameters(config, pipeline.parameters)
    return _text(config)


def trial_config(pipeline: PipelineSpec) -> str:
    """config.pbtxt of an ensemble over new entries that nobody is told of: it is asked once before they take
    the place of others.
    """
    return _text(
        _ensemble(pipeline, trial_name(pipeline), pipeline.inputs, pipeline.outputs, pipeline.stages)
    )


def trial_name(pipeline: PipelineSpec) -> str:
    """Its name."""
    return entry_name(pipeline.name, "trial", pipeline.generation)


def multimodal_config(pipeline: PipelineSpec) -> str:
    """config.pbtxt of the second ensemble of a model of texts and images: it begins with the image stage."""
    assert pipeline.image_stage is not None
    inputs = (*pipeline.inputs, TensorSpec(IMAGE, "STRING", (-1,)))
    stages = (pipeline.image_stage, *pipeline.stages)
    times = (spec for spec in pipeline.image_stage.outputs if spec.name == IMAGE_TIMES)
    outputs = (*pipeline.outputs, *times)
    return _text(_ensemble(pipeline, multimodal_name(pipeline.name), inputs, outputs, stages))


def _ensemble(
    pipeline: PipelineSpec,
    name: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    stages: tuple[StageSpec, ...],
) -> Any:
    config = _config(name, pipeline.max_batch_size, inputs, outputs)
    config.platform = "ensemble"
    used = {spec.name for stage in stages for spec in stage.inputs} | {o.name for o in outputs}
    made = {spec.name for spec in inputs}
    for stage in stages:
        step = config.ensemble_scheduling.step.add(
            model_name=entry_name(pipeline.name, stage.stage, pipeline.generation), model_version=-1
        )
        for spec in stage.inputs:
            if spec.name in made or not spec.is_optional:
                step.input_map[spec.name] = spec.name
        for spec in stage.outputs:
            # Of two steps that make the same the first counts.
            if spec.name in used and spec.name not in made:
                step.output_map[spec.name] = spec.name
                made.add(spec.name)
    return config


def parse(text: str) -> Any:
    """The ModelConfig message of a config.pbtxt. Raises google.protobuf.text_format.ParseError."""
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def _config(
    name: str, max_batch_size: int, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> Any:
    config = model_config_pb2.ModelConfig(name=name, max_batch_size=max_batch_size)
    for spec in inputs:
        config.input.add(
            name=spec.name,
            data_type=f"TYPE_{spec.dtype}",
            dims=spec.dims,
            allow_ragged_batch=spec.is_ragged,
            optional=spec.is_optional,
        )
    for spec in outputs:
        config.output.add(name=spec.name, data_type=f"TYPE_{spec.dtype}", dims=spec.dims)
    return config


def _set_parameters(config: Any, parameters: dict[str, str]) -> None:
    for name, value in sorted(parameters.items()):
        config.parameters[name].string_value = value


def _text(config: Any) -> str:
    text: str = text_format.MessageToString(config, use_index_order=True)
    return _HEADER + text
