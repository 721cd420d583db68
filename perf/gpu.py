"""On a GPU: how many tokens a second does the encoder run, and what share of the GPU's peak is that?

    .venv-test/bin/python perf/gpu.py
    .venv-test/bin/python perf/gpu.py --shapes bge-base bge-m3
    .venv-test/bin/python perf/gpu.py --dry-run

The shapes of published models with random weights, bfloat16: texts of 512 tokens, and mixes of 16 to 512.
Beside it sentence-transformers in the same run, with flash attention where it is installed and sdpa
otherwise, on batches of similar length. The peak is that of a large bfloat16 product, measured here; the
share counts two operations for each weight outside the embeddings and each token, and the attention.
--dry-run runs tiny shapes on the CPU and keeps nothing. Rows go to perf/results/gpu.csv.
"""

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import load
import model
import numpy as np
import safetensors
import shape
import torch
from recording import append, in_turn, spread

SHAPES = ("bge-base", "bge-large", "bge-m3", "Qwen3-Embedding-0.6B", "Qwen3-Embedding-8B")
PEAK = ("share of peak", "peak TFLOP/s")
TINY = ("tiny-bert", "tiny-qwen3")


def wait(device: torch.device) -> None:
    """Until all is computed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device, size: int) -> float:
    """Operations a second of a product of [size, size] matrices: the best of 20."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        wait(device)
        began = time.perf_counter()
        left @ right
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def operations(path: Path, config: Any, lengths: np.ndarray[Any, Any]) -> float:
    """Of a batch: two for each weight outside the embeddings and each token, and those of the attention."""
    weights = 0
    for file in path.glob("*.safetensors"):
        with safetensors.safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                # BERT's pooler is not run.
                if "embed" not in name and "pooler" not in name:
                    weights += math.prod(tensors.get_slice(name).get_shape())
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = head * config.num_attention_heads
    # Scores and their product with the values; a causal model needs half of it.
    pairs = float((lengths**2).sum()) * (0.5 if config.model_type == "qwen3" else 1)
    return 2.0 * weights * float(lengths.sum()) + 4.0 * config.num_hidden_layers * width * pairs


def own(path: Path, device: torch.device, lengths: np.ndarray[Any, Any], options: dict[str, Any]) -> Any:
    """A call that runs the batch, and the network."""
    encoder = model.build(path, device, dtype="bfloat16", **options)
    batch = shape.batch_of(lengths)

    def run() -> None:
        encoder.hidden(batch)
        wait(device)

    return run, encoder.forward.model


def peer(path: Path, device: torch.device, lengths: np.ndarray[Any, Any], most: int) -> Callable[[], None]:
    """sentence-transformers' chain on the same tokens, longest first, as many texts a batch as fit padded."""
    has_flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if has_flash else "sdpa"
    chain = model.sentence_transformer(path, torch.bfloat16, str(device), attn_implementation=attention)
    ids = [row.tolist() for row in shape.batch_of(lengths).split()]
    features = [
        {name: torch.from_numpy(value).to(device) for name, value in batch.items()}
        for batch in model.padded_batches(ids, max(1, most // int(lengths.max())))
    ]
    if "token_type_ids" not in chain.tokenizer.model_input_names:
        for batch in features:
            del batch["token_type_ids"]

    def run() -> None:
        with torch.inference_mode():
            for batch in features:
                chain(dict(batch))
        wait(device)

    return run


def main() -> None:
    parser = load.arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(shape.SHAPES))
    parser.add_argument("--tokens", type=int, default=65536, help="of one batch")
    parser.add_argument("--pass-tokens", type=int, default=16384, help="of one pass")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; nothing is kept")
    given = parser.parse_args()
    if not given.dry_run and not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU here; --dry-run shows on a CPU that the script runs")
    model.prepare()
    device = torch.device("cpu" if given.dry_run else "cuda")
    if given.dry_run:
        given.tokens, given.pass_tokens, given.rounds = 2048, 1024, 1
    best = peak(device, 512 if given.dry_run else 8192)
    print(f"peak: {best / 1e12:.1f} TFLOP/s")
    names = given.shapes or (TINY if given.dry_run else SHAPES)
    rows = [row for name in names for row in measure(name, device, best, given)]
    if not given.dry_run:
        header = ["shape", "lengths", "what", "tokens/s", "min", "max", *PEAK, "rounds"]
        append("gpu.csv", header, rows, peers=["sentence-transformers"], device=torch.cuda.get_device_name())


def measure(name: str, device: torch.device, best: float, given: argparse.Namespace) -> list[list[Any]]:
    path = shape.published(name)
    generator = np.random.default_rng(0)
    options = {"max_batch_tokens": given.pass_tokens}
    rows = []
    loads = {
        "512": np.full(given.tokens // 512, 512),
        "16 to 512": generator.integers(16, 513, given.tokens // 264),
    }
    for case, lengths in loads.items():
        run, network = own(path, device, lengths, options)
        other = peer(path, device, lengths, given.pass_tokens)
        runs = {"triton-embeddings": run, "sentence-transformers": other}
        work, tokens = operations(path, network.config, lengths), int(lengths.sum())
        timed = {what: _rate(run, tokens) for what, run in runs.items()}
        for what, rates in in_turn(timed, given.rounds).items():
            cells = spread(rates)
            share = float(cells[0]) / tokens * work / best
            rows.append([name, case, what, *cells, f"{share:.3f}", f"{best / 1e12:.1f}", len(rates)])
            print(f"{name:<22} {case:<10} {what:<22} {cells[0]:>9} tokens/s  {share:4.0%} of the peak")
        del run, other, network, runs, timed
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _rate(run: Callable[[], None], tokens: int) -> Callable[[], float]:
    def timed() -> float:
        began = time.perf_counter()
        run()
        return tokens / (time.perf_counter() - began)

    return timed


if __name__ == "__main__":
    main()
