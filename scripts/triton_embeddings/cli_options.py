"""The options that several commands take, with what --help says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Repository = Annotated[
    Path | None,
    typer.Option(
        "--model-repository", help="Where the models' entries lie. Default: the checkout's model_repository."
    ),
]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="On CPUs without bfloat16: float16 keeps the encoder's weights in half the memory, int8 "
        "computes in 8-bit integers, none is float32. Default: float16, none with --dtype."
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
MaxBatchTokens = Annotated[int | None, typer.Option(help="Tokens of one forward pass. Default: 16384.")]
MaxBatchSize = Annotated[int | None, typer.Option(help="Texts of one server request. Default: 64.")]
MaxLength = Annotated[
    int | None, typer.Option(help="Tokens of one text. Default: the checkpoint's own limit.")
]
Truncation = Annotated[
    str | None,
    typer.Option(
        help="What happens to longer texts by default: error, right (cut the end) or left. Default: error."
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads of the encoder. Default: one for each core.")]
Instances = Annotated[int | None, typer.Option(help="Processes of the encoder. Default: 1.")]
ServedModelName = Annotated[
    str | None, typer.Option(help="The model's name in the HTTP API. Default: its own name.")
]
Task = Annotated[
    str | None,
    typer.Option(
        help="What the checkpoint is for, whatever it says itself: embed, sparse, colbert, bge_m3, tokens, "
        "score or classify; RTP-LLM's words (DENSE_EMBEDDING ...) are understood."
    ),
]
ModelType = Annotated[str | None, typer.Option(help="The architecture, where config.json does not name it.")]
Causal = Annotated[
    bool | None,
    typer.Option(
        "--causal/--no-causal",
        help="Whether a decoder's tokens look only at those before them. Default: as the checkpoint says.",
    ),
]
RerankPrompt = Annotated[
    str | None,
    typer.Option(
        help="What stands around the pairs of a reranker made of a language model: none, qwen3, bge-gemma, "
        "mxbai or chat-template. Default: as the checkpoint says."
    ),
]
SharePrefix = Annotated[
    bool | None,
    typer.Option(
        "--share-prefix/--no-share-prefix",
        help="Whether a causal decoder computes once what several texts begin with. Default: it does.",
    ),
]
FuseHeads = Annotated[
    bool | None,
    typer.Option(
        "--fuse-heads/--no-fuse-heads",
        help="Run the heads inside the encoder's process: no hidden states travel between processes, but a "
        "request computes all of the model's heads, so give --task where one is enough. The vectors of all "
        "tokens (/embed_all) are then served only with --task tokens. Default: each head has a process.",
    ),
]
CudaGraphs = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graphs/--no-cuda-graphs",
        help="On a GPU, launch passes of up to 2048 tokens as CUDA graphs. Never run on a GPU yet. Default: "
        "no graphs.",
    ),
]
TrustRemoteCode = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Let code that a checkpoint brings run.")
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        help="The prompt around texts and images of a Qwen2-VL and its like: gme-qwen2-vl or "
        "qwen3-vl-embedding. Default: its family's."
    ),
]
ImagePositions = Annotated[
    str | None,
    typer.Option(
        help="Positions of image tokens in such a model: mrope (time, height and width) or plain (as words, "
        "which GME's own code does). Default: mrope."
    ),
]
MinImageTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of one image, at least. Default: 256 of GME, 4 of Qwen3-VL-Embedding."),
]
MaxImageTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of one image, at most. Default: 1280 of GME, 1800 of Qwen3-VL-Embedding."),
]
MaxContextBatchSize = Annotated[int | None, typer.Option(hidden=True)]
Live = Annotated[
    bool,
    typer.Option(
        "--live",
        help="Change the server that runs, too: new weights serve before the old ones go, and no request "
        "fails.",
    ),
]
LiveGrpcPort = Annotated[
    int | None, typer.Option(min=1, max=65535, help="With --live: tritonserver's gRPC port. Default: 8001.")
]
AllowImageUrls = Annotated[
    bool | None,
    typer.Option("--allow-image-urls", help="Fetch images that requests name by URL, from public addresses."),
]
ImageHosts = Annotated[
    str | None,
    typer.Option(
        help="Fetch images from these only: comma-separated names, *.names, addresses or networks. "
        "Implies --allow-image-urls."
    ),
]
