"""Runs in .venv-oracle: FlagEmbedding's reranker on pairs, JSON in and JSON out."""

import json
import sys

from FlagEmbedding import FlagReranker


def main() -> None:
    asked = json.load(sys.stdin)
    model = FlagReranker(asked["path"], use_fp16=False, devices="cpu")
    pairs = [tuple(pair) for pair in asked["pairs"]]
    answer = {
        "raw": list(map(float, model.compute_score(pairs, max_length=asked["max_length"]))),
        "normalized": list(
            map(float, model.compute_score(pairs, max_length=asked["max_length"], normalize=True))
        ),
    }
    json.dump(answer, sys.stdout)


main()
