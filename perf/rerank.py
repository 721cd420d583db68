"""How many pairs a second does a reranker score over HTTP, beside sentence-transformers' CrossEncoder?

    .venv-test/bin/python perf/rerank.py

Starts the server with the shapes of bge-reranker-base and random weights: a query and --documents
paragraphs a request, one request after the other and of four clients. CrossEncoder scores the same pairs
in this process, in float32 and in bfloat16, in turn. Rows go to perf/results/rerank.csv.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import load
import model
import server
import shape
import torch
from load import Load
from recording import append_rates, in_turn

QUERY = "what is the value of a class"


def cross_encoder(path: Path, documents: list[str], dtype: torch.dtype) -> Callable[[], float]:
    """Pairs a second of sentence-transformers."""
    from sentence_transformers import CrossEncoder

    scorer = CrossEncoder(str(path), device="cpu", max_length=512, model_kwargs={"dtype": dtype})

    def run() -> float:
        began = time.perf_counter()
        scorer.predict([(QUERY, document) for document in documents], batch_size=32, show_progress_bar=False)
        return len(documents) / (time.perf_counter() - began)

    return run


def pairs_a_second(url: str, documents: list[str], one: Load) -> float:
    """Of /v1/rerank, on which all of a request's items are documents of one query."""
    return load.run(url, documents, one, {"query": QUERY}, "documents").rate


def main() -> None:
    parser = load.arguments(__doc__)
    server.add_arguments(parser)
    parser.add_argument(
        "--shape", default="bge-reranker-base", choices=["bge-reranker-base", "tiny-reranker"]
    )
    parser.add_argument("--documents", type=int, default=32)
    given = parser.parse_args()
    model.prepare()
    path = shape.published(given.shape)
    # The random vocabulary has few words, so these characters are about as many tokens.
    documents = [text[:120] for text in model.texts()[: given.documents]]
    with server.ours(given, path) as serving:
        url = f"{serving.url}/v1/rerank"
        cases: dict[str, Callable[[], float]] = {
            f"{clients} clients x {len(documents)} documents": partial(
                pairs_a_second, url, documents, Load(clients, len(documents), 2)
            )
            for clients in (1, 4)
        }
        for dtype in (torch.float32, torch.bfloat16):
            name = f"CrossEncoder {str(dtype).removeprefix('torch.')}, {len(documents)} documents"
            cases[name] = cross_encoder(path, documents, dtype)
        rates = in_turn(cases, given.rounds)
    append_rates("rerank.csv", "pairs", rates, digits=1, peers=["sentence-transformers"])


if __name__ == "__main__":
    main()
