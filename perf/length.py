"""What does a token cost in long texts and in mixed ones, packed and padded?

    .venv-test/bin/python perf/length.py

The encoder in process, random weights (--layers of --hidden, BERT's architecture), 8192 tokens a pass:
texts of one length from 16 to 8192 tokens, then mixes of the same number of tokens: all of 128, lengths
spread evenly from 8 to 512, as many of their mean, and 15 short ones for each long one. Beside it
transformers' own attention (sdpa) on padded batches: `padded, sorted` cuts them by length first, as the best
padding servers do; `padded, as they come` does not. Tokens are those of the texts, never padding. Rows go to
perf/results/length.csv.
"""

import argparse
import time
from collections.abc import Callable

import load
import model
import numpy as np
import shape
import torch
from recording import append, in_turn, spread

from backends.ragged import Ragged

LENGTHS = (16, 64, 256, 1024, 4096, 8192)


def mixes(tokens: int) -> dict[str, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Lengths that add up to about `tokens`, in a random order."""
    generator = np.random.default_rng(0)
    even = generator.integers(8, 513, tokens // 260)
    skewed = np.tile([16] * 15 + [512], max(1, tokens // 752))
    return {
        "all of 128": np.full(tokens // 128, 128),
        # As many texts, and as many tokens in all, as in the next.
        f"all of {even.sum() // len(even)}": np.full(len(even), even.sum() // len(even)),
        "8 to 512": even,
        "15 of 16, 1 of 512": generator.permutation(skewed),
    }


def as_they_come(padded: model.Encoder, batch: Ragged, size: int = 16) -> None:
    """Batches of `size` texts, each padded to its longest."""
    rows = batch.split()
    with torch.inference_mode():
        for start in range(0, len(rows), size):
            padded.forward(Ragged.pack(rows[start : start + size]))


def main() -> None:
    parser = load.arguments(__doc__, rounds=3)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=8192, help="of one batch")
    parser.add_argument("--dtype", help="of all ways. Default: auto")
    parser.add_argument("--quantization", help="of the packed way")
    given = parser.parse_args()
    model.prepare()
    cases = {
        f"length {length}": np.full(max(1, given.tokens // length), length)
        for length in LENGTHS
        if length <= given.tokens
    }
    measure(given, cases | mixes(given.tokens))


def measure(given: argparse.Namespace, cases: dict[str, np.ndarray[tuple[int], np.dtype[np.int64]]]) -> None:
    sizes = shape.bert_sizes(given.hidden, given.layers)
    path = shape.make(f"bert {given.hidden} x {given.layers}", shape.encoder, **sizes)
    kept = given.quantization or "none"
    packed = model.build(path, dtype=given.dtype, quantization=kept, max_batch_tokens=8192)
    padded = model.build(path, is_padded=True, dtype=given.dtype, max_batch_tokens=8192)
    way = f"packed, {given.quantization}" if given.quantization else "packed"
    rows = []
    for case, lengths in cases.items():
        batch = shape.batch_of(lengths)
        ways: dict[str, Callable[[], object]] = {
            way: lambda batch=batch: packed.hidden(batch),  # type: ignore[misc]
            "padded, sorted": lambda batch=batch: padded.hidden(batch),  # type: ignore[misc]
        }
        if len(set(lengths)) > 1:
            ways["padded, as they come"] = lambda batch=batch: as_they_come(padded, batch)  # type: ignore[misc]
        timed = {name: _per_token(run, len(batch.values)) for name, run in ways.items()}
        for name, values in in_turn(timed, given.rounds).items():
            rows.append([case, name, len(lengths), len(batch.values), *spread(values, 1), len(values)])
            print(f"{case:<20} {name:<22} {rows[-1][4]:>8} us a token  [{rows[-1][5]}-{rows[-1][6]}]")
    append("length.csv", ["case", "way", "texts", "tokens", "us/token", "min", "max", "rounds"], rows)


def _per_token(run: Callable[[], object], tokens: int) -> Callable[[], float]:
    def timed() -> float:
        began = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - began) / tokens

    return timed


if __name__ == "__main__":
    main()
