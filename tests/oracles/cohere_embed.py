"""Runs in .venv-oracle: Cohere's clients against a server, JSON in and JSON out."""

import asyncio
import json
import sys

import cohere
from langchain_cohere import CohereEmbeddings


def second(url, texts, image):
    client = cohere.ClientV2(api_key="none", base_url=url)
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    answer = client.embed(
        model="org/gme", input_type="search_document", texts=texts, embedding_types=types, output_dimension=8
    )
    vectors = {kind: getattr(answer.embeddings, "float_" if kind == "float" else kind) for kind in types}
    seen = client.embed(model="org/gme", input_type="image", images=[image])
    content = [
        cohere.TextEmbedContent(text="hi"),
        cohere.ImageUrlEmbedContent(image_url=cohere.EmbedImageUrl(url=image)),
    ]
    both = client.embed(
        model="org/gme", input_type="search_document", inputs=[cohere.EmbedInput(content=content)]
    )
    return {
        "vectors": vectors,
        "texts": answer.texts,
        "version": answer.meta.api_version.version,
        "tokens": answer.meta.billed_units.input_tokens,
        "image": seen.embeddings.float_,
        "images": seen.meta.billed_units.images,
        "both": both.embeddings.float_,
    }


def first(url, texts, image):
    client = cohere.Client(api_key="none", base_url=url)
    # It sends 96 at a time.
    many = client.embed(model="org/gme", input_type="search_query", texts=texts * 100)
    few = client.embed(model="org/gme", input_type="search_query", texts=["x" * 20], embedding_types=["int8"])
    seen = client.embed(model="org/gme", input_type="image", images=[image])
    return {
        "kind": many.response_type,
        "many": many.embeddings,
        "texts": many.texts,
        "int8": few.embeddings.int8,
        "warnings": few.meta.warnings,
        "image": seen.embeddings,
    }


def awaited(url, texts, image):
    async def ask():
        async with cohere.AsyncClientV2(api_key="none", base_url=url) as client:
            return await client.embed(model="org/gme", input_type="search_document", texts=texts)

    return asyncio.run(ask()).embeddings.float_


def refused(url, texts, image):
    client = cohere.ClientV2(api_key="none", base_url=url)
    told = []
    for model, given in (
        ("org/gme", {"texts": [""]}),
        ("org/tiny", {"images": [image]}),
        ("x", {"texts": texts}),
    ):
        try:
            client.embed(model=model, input_type="search_document", **given)
        except cohere.core.ApiError as error:
            told.append([type(error).__name__, error.body])
    return told


def langchain(url, texts, image):
    client = CohereEmbeddings(model="org/gme", cohere_api_key="none", base_url=url)
    return [client.embed_documents(texts), client.embed_query(texts[0])]


CLIENTS = {"second": second, "first": first, "awaited": awaited, "refused": refused, "langchain": langchain}


def main() -> None:
    asked = json.load(sys.stdin)
    json.dump({name: client(**asked) for name, client in CLIENTS.items()}, sys.stdout)


main()
