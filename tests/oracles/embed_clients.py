"""Runs in .venv-oracle: clients of other makers that embed texts and images, JSON in and JSON out."""

import json
import os
import sys

# litellm asks the internet for prices otherwise.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
KINDS = ["float", "int8", "uint8", "binary", "ubinary"]


def _vectors(answer):
    found = answer.embeddings.model_dump() if hasattr(answer.embeddings, "model_dump") else answer.embeddings
    return {
        "float": found.get("float_") or found.get("float"),
        **{kind: found.get(kind) for kind in KINDS[1:]},
    }


def cohere_v2(url, model, texts, images):
    """Texts, images, and both in one item."""
    import cohere

    client = cohere.ClientV2(api_key="none", base_url=url)
    given = {"model": model, "embedding_types": KINDS}
    parts = [
        {"content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": image}}]}
        for text, image in zip(texts, images, strict=False)
    ]
    answers = {
        "texts": client.embed(input_type="search_document", texts=texts, **given),
        "images": client.embed(input_type="image", images=images, **given),
    }
    if model != "clip":
        answers["inputs"] = client.embed(input_type="search_document", inputs=parts, **given)
    return {name: _vectors(answer) for name, answer in answers.items()}


def cohere_v1(url, model, texts, images):
    import cohere

    client = cohere.Client(api_key="none", base_url=url)
    return {
        "texts": {"float": client.embed(model=model, texts=texts, input_type="search_document").embeddings},
        "images": _vectors(
            client.embed(model=model, images=images, input_type="image", embedding_types=["float", "int8"])
        ),
    }


def cohere_error(url, model, texts, images):
    import cohere

    client = cohere.ClientV2(api_key="none", base_url=url)
    broken = "data:image/png;base64,aGVsbG8="
    try:
        client.embed(model=model, images=[broken], input_type="image", embedding_types=["float"])
    except cohere.errors.BadRequestError as error:
        return error.body["message"]
    return None


def infinity(url, model, texts, images):
    """infinity's own client, with its word for what the strings are."""
    from infinity_client import Client
    from infinity_client.api.default import embeddings
    from infinity_client.models import OpenAIEmbeddingInputImage, OpenAIEmbeddingInputText

    client = Client(base_url=url)
    found = {}
    for name, body in {
        "texts": OpenAIEmbeddingInputText(input_=texts, model=model),
        "images": OpenAIEmbeddingInputImage(input_=images, model=model),
    }.items():
        answer = embeddings.sync(client=client, body=body)
        found[name] = {"float": [row.embedding for row in answer.data]}
    return found


if __name__ == "__main__":
    question = json.load(sys.stdin)
    client = globals()[question.pop("client")]
    json.dump(client(**question), sys.stdout)
