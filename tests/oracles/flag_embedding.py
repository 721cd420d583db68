"""Runs in .venv-oracle: what FlagEmbedding makes of texts with a BGE-M3 checkpoint, JSON in and JSON out."""

import json
import sys

from FlagEmbedding import BGEM3FlagModel


def main() -> None:
    asked = json.load(sys.stdin)
    model = BGEM3FlagModel(asked["path"], use_fp16=False, devices="cpu")
    made = model.encode(
        asked["texts"],
        max_length=asked["max_length"],
        return_dense=True,
        return_sparse=True,
        return_colbert_vecs=True,
    )
    scores = model.compute_score(
        [tuple(pair) for pair in asked["pairs"]],
        max_passage_length=asked["max_length"],
        weights_for_different_modes=asked["weights"],
    )
    answer = {
        "dense": made["dense_vecs"].tolist(),
        "sparse": [{token: float(w) for token, w in row.items()} for row in made["lexical_weights"]],
        "colbert": [vectors.tolist() for vectors in made["colbert_vecs"]],
        "scores": {name: [float(score) for score in values] for name, values in scores.items()},
    }
    json.dump(answer, sys.stdout)


main()
