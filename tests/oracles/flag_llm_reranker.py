"""Runs in .venv-oracle: FlagEmbedding's reranker made of a language model, JSON in and JSON out."""

import json
import sys

from FlagEmbedding import FlagLLMReranker


def main() -> None:
    asked = json.load(sys.stdin)
    model = FlagLLMReranker(asked["path"], use_fp16=False, devices="cpu")
    pairs = [tuple(pair) for pair in asked["pairs"]]
    scores = model.compute_score(pairs, max_length=asked["max_length"], prompt=asked.get("prompt"))
    json.dump(list(map(float, scores)), sys.stdout)


main()
