"""How fast is the encoder itself, in process, beside what a person would use instead, and how exact?

    scripts/setup --perf
    .venv-perf/bin/python perf/encoder.py

512 real paragraphs of at most 256 tokens, tokenised before the clock starts, through all-MiniLM-L6-v2: this
project's encoder stage, asked as the gateway asks it, and its dense head; sentence-transformers; ONNX Runtime
with its own fusions. All on every core of this machine, in one process, in turn. The peers get padded batches
of similar length, of the size that serves them best (--batch). The cosine is to sentence-transformers in
float32, the least of all texts.
Rows go to perf/results/encoder.csv.
"""

import time
from collections.abc import Callable
from typing import Any

import load
import minilm_onnx
import model
import numpy as np
import torch
from recording import append, in_turn, spread

Embed = Callable[[], np.ndarray[Any, Any]]
REFERENCE = "sentence-transformers float32"


def own(ids: list[list[int]], **options: Any) -> Embed:
    """This project's encoder stage, in the order in which padded batches come."""
    stage = model.stage(model.MINILM, **options)
    ordered = sorted(ids, key=lambda one: -len(one))
    return lambda: stage.embed(ordered)


def sentence_transformers(batches: list[dict[str, Any]], dtype: torch.dtype) -> Embed:
    """Its own chain on token ids."""
    chain = model.sentence_transformer(model.MINILM, dtype)
    features = [{name: torch.from_numpy(value) for name, value in batch.items()} for batch in batches]

    def embed() -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            vectors = [chain(dict(batch))["sentence_embedding"].float() for batch in features]
        return torch.cat(vectors).numpy()

    return embed


def main() -> None:
    parser = load.arguments(__doc__)
    parser.add_argument("--dtype", action="append", help="of this project; may be given again. Default: auto")
    parser.add_argument(
        "--quantization",
        action="append",
        help="of this project, besides the dtypes. Default: float16 and int8",
    )
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16, help="texts of one padded batch")
    given = parser.parse_args()
    model.prepare()
    ids = model.tokenize(model.texts(given.texts))
    batches = model.padded_batches(ids, given.batch)
    cases: dict[str, Embed] = {
        f"sentence-transformers {str(dtype).removeprefix('torch.')}": sentence_transformers(batches, dtype)
        for dtype in model.peer_dtypes()
    }
    for kind in ("float32", *minilm_onnx.INT8):
        embed = minilm_onnx.embedder(kind)
        cases[f"onnxruntime {kind}"] = lambda embed=embed: embed(batches)  # type: ignore[misc]
    for dtype in given.dtype or ["auto"]:
        cases[f"triton-embeddings {dtype}"] = own(ids, dtype=dtype, quantization="none")
    for quantization in given.quantization or ["float16", "int8"]:
        cases[f"triton-embeddings quantized to {quantization}"] = own(ids, quantization=quantization)
    measure(cases, sum(map(len, ids)), given.rounds)


def measure(cases: dict[str, Embed], tokens: int, rounds: int) -> None:
    exact = cases[REFERENCE]()
    cosines = {name: float((run() * exact).sum(1).min()) for name, run in cases.items()}

    def timed(run: Embed) -> Callable[[], float]:
        def rate() -> float:
            began = time.perf_counter()
            run()
            return tokens / (time.perf_counter() - began)

        return rate

    rates = in_turn({name: timed(run) for name, run in cases.items()}, rounds)
    rows = []
    for name, values in rates.items():
        middle, low, high = spread(values)
        print(f"{name:<48} {middle:>7} tokens/s  [{low}-{high}]  cosine {cosines[name]:.5f}")
        rows.append([name, middle, low, high, rounds, f"{cosines[name]:.5f}"])
    header = ["what", "tokens/s", "min", "max", "rounds", "least cosine"]
    append("encoder.csv", header, rows, peers=["sentence-transformers", "onnxruntime"])


if __name__ == "__main__":
    main()
