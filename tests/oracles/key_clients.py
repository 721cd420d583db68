"""Runs in .venv-oracle: what clients of several makers raise when a key is refused, JSON in and JSON out."""

import json
import os
import sys

# litellm asks the internet for prices otherwise.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"


def cohere(url, key, model):
    import cohere

    cohere.ClientV2(api_key=key, base_url=url).embed(model=model, input_type="search_query", texts=["a"])


def cohere_rerank(url, key, model):
    import cohere

    cohere.Client(api_key=key, base_url=url).rerank(model=model, query="a", documents=["b"])


def voyage(url, key, model):
    import voyageai

    voyageai.Client(api_key=key, base_url=f"{url}/v1").rerank("a", ["b"], model)


def litellm(url, key, model):
    import litellm

    litellm.embedding(model=f"openai/{model}", input=["a"], api_base=f"{url}/v1", api_key=key)


def huggingface(url, key, model):
    from huggingface_hub import InferenceClient

    InferenceClient(f"{url}/embed", token=key).feature_extraction("a", model=f"{url}/embed")


CLIENTS = {f.__name__: f for f in (cohere, cohere_rerank, voyage, litellm, huggingface)}


def main() -> None:
    asked = json.load(sys.stdin)
    told = {}
    for name, client in CLIENTS.items():
        for key in asked["keys"]:
            try:
                client(asked["url"], key, asked["model"])
                error = ["", ""]
            except Exception as problem:
                error = [type(problem).__name__, str(getattr(problem, "body", None) or problem)]
            told.setdefault(name, []).append(error)
    json.dump(told, sys.stdout)


main()
