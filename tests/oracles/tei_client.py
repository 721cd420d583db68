"""Runs in .venv-oracle: LlamaIndex's client of text-embeddings-inference against a server, JSON in
and JSON out.
"""

import asyncio
import json
import sys

from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference


def main() -> None:
    asked = json.load(sys.stdin)
    client = TextEmbeddingsInference(model_name=asked["model"], base_url=asked["url"], auth_token="none")
    answer = {
        "texts": client.get_text_embedding_batch(asked["texts"]),
        "query": client.get_query_embedding(asked["texts"][0]),
        "query_async": asyncio.run(client.aget_query_embedding(asked["texts"][0])),
    }
    json.dump(answer, sys.stdout)


main()
