"""What it saves to compute once what texts begin with: a rerank request, its prompt shared or not.

    .venv-test/bin/python perf/prefix.py

A prompt of 150 tokens (system, instruction and query of Qwen3-Reranker take about as many) and 100 documents
of 30, through the encoder of a random Qwen3 of 8 layers of 512, in process. Rounds take turns, so that a
noisy machine is noisy to both. Rows go to perf/results/prefix.csv.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from recording import append

from backends.checkpoint import Checkpoint
from backends.device import compute_dtype
from backends.encode import encode
from backends.families import family_of
from backends.forward import Forward
from backends.ragged import Ragged
from backends.self_check import choose_forward
from backends.shared_prefix import plan
from tests.support.checkpoints import qwen3

SIZES = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "max_length": 4096,
}
MAX_BATCH_TOKENS = 8192
CPU = torch.device("cpu")


def load(checkpoint: Checkpoint, *, shares: bool) -> Forward:
    """The encoder, in the format that is fastest here."""
    family = family_of(checkpoint)
    dtype = compute_dtype("auto", CPU)
    return choose_forward(
        lambda attention: family.load(checkpoint, attention, dtype, CPU),
        family,
        dict(checkpoint.config),
        "qwen3",
        shares_prefixes=shares,
    )


def batch_of(n_prefix: int, n_documents: int, n_tokens: int) -> Ragged:
    """Sequences that begin with the same tokens."""
    generator = np.random.default_rng(0)
    prefix = generator.integers(5, 300, n_prefix)
    rows = [np.concatenate([prefix, generator.integers(5, 300, n_tokens)]) for _ in range(n_documents)]
    return Ragged.pack([torch.from_numpy(row) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefix", type=int, default=150)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    batch = batch_of(given.prefix, given.documents, given.tokens)
    shared = plan(batch.values.numpy(), batch.lengths, MAX_BATCH_TOKENS)
    computed = {False: len(batch.values), True: sum(len(one.row) for one in shared)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        transformers.logging.set_verbosity_error()
        checkpoint = Checkpoint.read(qwen3(Path(folder) / "c", **SIZES))
        forwards = {shares: load(checkpoint, shares=shares) for shares in (False, True)}
        with torch.inference_mode():
            for turn in range(given.rounds + 1):
                for shares, forward in forwards.items():
                    began = time.perf_counter()
                    encode(forward, batch, MAX_BATCH_TOKENS, torch.float32)
                    if turn:
                        seconds[shares].append(time.perf_counter() - began)
    case = f"{given.prefix} + {given.documents} x {given.tokens}"
    write(case, computed, seconds)


def write(case: str, computed: dict[bool, int], seconds: dict[bool, list[float]]) -> None:
    rows = []
    for shares, values in seconds.items():
        low, middle, high = (round(1000 * f(values)) for f in (min, statistics.median, max))
        name = "shared" if shares else "whole"
        print(f"{case:<16} {name:<7} {computed[shares]:>6} tokens  {middle:>6} ms  [{low}-{high}]")
        rows.append([case, shares, computed[shares], middle, low, high, len(values)])
    append("prefix.csv", ["case", "shared", "tokens computed", "ms", "min", "max", "rounds"], rows)


if __name__ == "__main__":
    main()
