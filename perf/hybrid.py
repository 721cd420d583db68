"""What one pass for several heads saves: dense, sparse and ColBERT alone, together, and as three requests.

    .venv-test/bin/python perf/hybrid.py
    .venv-test/bin/python perf/hybrid.py --shape small-m3

Starts the server with the shapes of BGE-M3 and random weights; small-m3 has 6 layers of 384. Of clients of 16
texts a request. Rounds take turns, so that a noisy machine is noisy to all of them. On two cores BGE-M3 takes
eight minutes with --clients 1 --rounds 1, half of them to warm up. Rows go to perf/results/hybrid.csv.
"""

import time
from functools import partial

import load
import model
import server
import shape
from load import Load
from recording import append_rates, in_turn

LOADS = {
    "dense": [["dense"]],
    "sparse": [["sparse"]],
    "colbert": [["colbert"]],
    "dense + sparse, one request": [["dense", "sparse"]],
    "all three, one request": [["dense", "sparse", "colbert"]],
    "all three, a request each": [["dense"], ["sparse"], ["colbert"]],
}


def rate(url: str, texts: list[str], one: Load, requests: list[list[str]], tokens: int) -> float:
    """Tokens of the texts a second, whatever number of requests they take."""
    began = time.perf_counter()
    for outputs in requests:
        body = {"outputs": outputs, "truncate": True, "encoding_format": "base64"}
        load.run(f"{url}/v1/embeddings/hybrid", texts, one, body)
    return one.clients * one.requests * tokens / (time.perf_counter() - began)


def main() -> None:
    parser = load.arguments(__doc__)
    server.add_arguments(parser)
    parser.add_argument("--shape", default="bge-m3", choices=["bge-m3", "small-m3", "tiny-m3"])
    parser.add_argument("--clients", type=int, default=4)
    given = parser.parse_args()
    path = shape.published(given.shape)
    texts = [text[:256] for text in model.texts()[:16]]
    tokens = sum(map(len, model.tokenize(texts, path)))
    with server.ours(given, path) as serving:
        one = Load(given.clients, len(texts), 2)
        cases = {
            f"{given.shape}: {name}": partial(rate, serving.url, texts, one, requests, tokens)
            for name, requests in LOADS.items()
        }
        append_rates("hybrid.csv", "tokens", in_turn(cases, given.rounds))


if __name__ == "__main__":
    main()
