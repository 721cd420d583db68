"""The command triton-embeddings."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import secrets
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from backends.contract import PipelineParameter
from backends.errors import BackendError
from backends.options import ServingOptions
from backends.repository.writer import list_pipelines
from backends.repository.writer import remove as remove_pipeline
from backends.source import default_name
from gateway.keys import UnusableKeys, check_key, digest_of
from triton_embeddings import models
from triton_embeddings.addresses import LOOPBACK, Addresses
from triton_embeddings.cli_options import (
    AllowImageUrls,
    Causal,
    ChatTemplate,
    CudaGraphs,
    Device,
    Dtype,
    FuseHeads,
    ImageHosts,
    ImagePositions,
    Instances,
    Live,
    LiveGrpcPort,
    MaxBatchSize,
    MaxBatchTokens,
    MaxContextBatchSize,
    MaxImageTokens,
    MaxLength,
    MinImageTokens,
    ModelType,
    Quantization,
    Repository,
    RerankPrompt,
    ServedModelName,
    SharePrefix,
    Task,
    Threads,
    Truncation,
    TrustRemoteCode,
)
from triton_embeddings.errors import CommandError
from triton_embeddings.flags import rewrite
from triton_embeddings.launch import launch
from triton_embeddings.live import LiveServer, interruptible
from triton_embeddings.preflight import check_strangers, read_gateway_settings
from triton_embeddings.process import Stop
from triton_embeddings.server_binary import scratch_directory

app = typer.Typer(
    help="Serve embedding models on NVIDIA Triton Inference Server.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Not wrapped where it is no terminal, so that the output can be searched.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 400)

# What a head serves, in the words of the API.
_SERVED = {"dense": "embed", "sparse": "sparse", "colbert": "colbert", "tokens": "tokens", "logits": "score"}
_PORT: dict[str, Any] = {"min": 0, "max": 65535}
_GRPC_PORT = 8001
_CHECKPOINT_HELP = "A directory, package:PACKAGE/PATH, or an id of the Hugging Face hub."


def _print_version(is_asked: bool) -> None:
    if is_asked:
        console.print(importlib.metadata.version("triton-embeddings"))
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve embedding models on NVIDIA Triton Inference Server."""


@app.command()
def add(
    checkpoint: Annotated[str, typer.Argument(help=_CHECKPOINT_HELP)],
    name: Annotated[
        str | None, typer.Option(help="The model's name. Default: the checkpoint's folder.")
    ] = None,
    model_repository: Repository = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    device: Device = None,
    max_batch_tokens: MaxBatchTokens = None,
    max_batch_size: MaxBatchSize = None,
    max_length: MaxLength = None,
    truncation: Truncation = None,
    threads: Threads = None,
    instances: Instances = None,
    served_model_name: ServedModelName = None,
    task: Task = None,
    model_type: ModelType = None,
    causal: Causal = None,
    rerank_prompt: RerankPrompt = None,
    share_prefix: SharePrefix = None,
    fuse_heads: FuseHeads = None,
    cuda_graphs: CudaGraphs = None,
    chat_template: ChatTemplate = None,
    image_positions: ImagePositions = None,
    min_image_tokens: MinImageTokens = None,
    max_image_tokens: MaxImageTokens = None,
    trust_remote_code: TrustRemoteCode = None,
    max_context_batch_size: MaxContextBatchSize = None,
    live: Live = False,
    grpc_port: LiveGrpcPort = None,
) -> None:
    """Write the model repository's entries of a checkpoint; its weights stay where they are."""
    options = _given(locals())
    if live:
        undone = interruptible("everything stays as it was")
        with undone, LiveServer(grpc_port or _GRPC_PORT, model_repository) as server:
            pipeline, is_replaced = server.add(checkpoint, name, options)
    else:
        repository = model_repository or models.default_repository()
        is_replaced = any(
            entry.name == (name or default_name(checkpoint)) for entry in list_pipelines(repository)
        )
        pipeline = models.add(repository, checkpoint, name, options)
    facts = pipeline.parameters
    size = facts.get(PipelineParameter.DIMENSIONS)
    console.print(
        f"{'replaced' if is_replaced else 'added'} {pipeline.name}: {facts[PipelineParameter.FAMILY]}, "
        f"{f'{size} dimensions, ' if size else ''}{facts[PipelineParameter.MAX_LENGTH]} tokens, "
        f"from {facts[PipelineParameter.CHECKPOINT]}",
        soft_wrap=True,
    )
    for head, reason in pipeline.reasons.items():
        console.print(f"  {_SERVED[head]:<8} {reason}", soft_wrap=True, markup=False)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="The model's name, as `list` shows it.")],
    model_repository: Repository = None,
    live: Live = False,
    grpc_port: LiveGrpcPort = None,
) -> None:
    """Delete the model repository's entries of a model; its checkpoint stays."""
    if live:
        halfway = interruptible(f"{name} may be gone in part: remove it once more")
        with halfway, LiveServer(grpc_port or _GRPC_PORT, model_repository) as server:
            server.remove(name)
    else:
        remove_pipeline(model_repository or models.default_repository(), name)
    console.print(f"removed {name}")


@app.command(name="list")
def list_models(model_repository: Repository = None) -> None:
    """Show the models of the repository."""
    repository = model_repository or models.default_repository()
    entries = list_pipelines(repository)
    if not entries:
        console.print(
            f"{repository} has no models; add one with: triton-embeddings add CHECKPOINT", soft_wrap=True
        )
        return
    table = Table(
        "name",
        "served as",
        "family",
        "tasks",
        "dimensions",
        "max tokens",
        "checkpoint",
        box=None,
        padding=(0, 3, 0, 0),
    )
    table.columns[-1].overflow = "fold"
    for entry in entries:
        facts = entry.parameters
        columns = (
            PipelineParameter.SERVED_MODEL_NAME,
            PipelineParameter.FAMILY,
            PipelineParameter.TASKS,
            PipelineParameter.DIMENSIONS,
            PipelineParameter.MAX_LENGTH,
            PipelineParameter.CHECKPOINT,
        )
        table.add_row(entry.name, *(facts.get(column, "") for column in columns))
    console.print(table, soft_wrap=True)


@app.command()
def serve(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"{_CHECKPOINT_HELP} Served alone; without one, everything in the model repository."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address of the gateway; 0.0.0.0 is every interface.")] = LOOPBACK,
    port: Annotated[int, typer.Option(**_PORT, help="Port of the gateway; 0 is any free one.")] = 30000,
    http_port: Annotated[int, typer.Option(**_PORT, help="tritonserver's HTTP port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(**_PORT, help="tritonserver's gRPC port.")] = _GRPC_PORT,
    metrics_port: Annotated[int, typer.Option(**_PORT, help="tritonserver's metrics port.")] = 8002,
    allow_image_urls: AllowImageUrls = None,
    image_hosts: ImageHosts = None,
    model_repository: Repository = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    device: Device = None,
    max_batch_tokens: MaxBatchTokens = None,
    max_batch_size: MaxBatchSize = None,
    max_length: MaxLength = None,
    truncation: Truncation = None,
    threads: Threads = None,
    instances: Instances = None,
    served_model_name: ServedModelName = None,
    task: Task = None,
    model_type: ModelType = None,
    causal: Causal = None,
    rerank_prompt: RerankPrompt = None,
    share_prefix: SharePrefix = None,
    fuse_heads: FuseHeads = None,
    cuda_graphs: CudaGraphs = None,
    chat_template: ChatTemplate = None,
    image_positions: ImagePositions = None,
    min_image_tokens: MinImageTokens = None,
    max_image_tokens: MaxImageTokens = None,
    trust_remote_code: TrustRemoteCode = None,
    max_context_batch_size: MaxContextBatchSize = None,
) -> None:
    """Start tritonserver and the gateway, and serve until Ctrl-C."""
    options = _given(locals())
    flags = {"allow_image_urls": "true"} if allow_image_urls else {}
    if image_hosts is not None:
        flags["image_hosts"] = image_hosts
    addresses = Addresses(host, port, http_port, grpc_port, metrics_port).claim()
    repository = model_repository or models.default_repository()
    with models.served_repository(repository, checkpoints or [], options, scratch_directory()) as served:
        launch(served, addresses, console, Stop(), flags)


@app.command()
def gateway(
    server: Annotated[
        str | None,
        typer.Option(
            help="host:port of tritonserver's gRPC interface; of several servers that have the same models, "
            "with commas between them. Default: 127.0.0.1:8001."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address; 0.0.0.0 is every interface.")] = None,
    port: Annotated[int | None, typer.Option(**_PORT, help="Default: 30000.")] = None,
    reuse_port: Annotated[
        bool | None,
        typer.Option("--reuse-port", help="Share the port with another gateway, as to take its place."),
    ] = None,
) -> None:
    """Start the gateway alone, for servers that run already, and answer until Ctrl-C."""
    given = {"server": server, "host": host, "port": port, "reuse_port": reuse_port}
    flags = {name: str(value) for name, value in given.items() if value is not None}
    check_strangers(read_gateway_settings(flags))
    environment = {**os.environ, **{f"GATEWAY_{name.upper()}": value for name, value in flags.items()}}
    os.execve(sys.executable, [sys.executable, "-m", "gateway"], environment)


@app.command()
def hash_key(
    name: Annotated[str, typer.Argument(help="Whose key it is; it stands in messages and logs.")] = "",
) -> None:
    """Print the line of an API key for GATEWAY_API_KEYS_FILE. The key is read from standard input; where that
    is a terminal, a new one is made.
    """
    is_new = sys.stdin.isatty()
    key = f"sk-{secrets.token_urlsafe(32)}" if is_new else sys.stdin.readline().strip()
    try:
        check_key(key, "the line on standard input")
    except UnusableKeys as error:
        raise CommandError(str(error)) from error
    if is_new:
        # Not to standard output, which may go into the file.
        Console(stderr=True, highlight=False).print(
            f"the key, which is shown only now: {key}", soft_wrap=True
        )
    line = json.dumps({"name": name or f"key-{digest_of(key).hex()[:8]}", "sha256": digest_of(key).hex()})
    console.print(line, markup=False, soft_wrap=True)


# max_context_batch_size is RTP-LLM's way to say max_batch_tokens, and becomes it when the checkpoint is read.
_OPTIONS = (*(field.name for field in dataclasses.fields(ServingOptions)), "max_context_batch_size")


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options of a checkpoint that stand on the command line."""
    # An explicit 0 counts: it is refused with its name, not taken for a default.
    given = {name: arguments[name] for name in _OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def main() -> None:
    """Runs a command; errors are one line and exit code 1."""
    try:
        app(rewrite(sys.argv[1:]))
    except (BackendError, CommandError) as error:
        _fail(str(error))
    except OSError as error:
        # A folder that cannot be written, a full disk.
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}")


def _fail(message: str) -> NoReturn:
    Console(stderr=True, highlight=False, markup=False).print(f"error: {message}", soft_wrap=True)
    sys.exit(1)
