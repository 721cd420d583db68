"""Runs in .venv-oracle: rerank clients of several makers against a server, JSON in and JSON out."""

import asyncio
import json
import os
import sys

# litellm asks the internet for prices otherwise.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"


def cohere_v2(url, model, query, documents):
    import cohere

    answer = cohere.ClientV2(api_key="none", base_url=url).rerank(
        model=model, query=query, documents=documents, top_n=3
    )
    return [(row.index, row.relevance_score) for row in answer.results]


def cohere_v1(url, model, query, documents):
    import cohere

    client = cohere.Client(api_key="none", base_url=url)
    answer = client.rerank(
        model=model, query=query, documents=[{"text": d} for d in documents], top_n=3, return_documents=True
    )
    assert [row.document.text for row in answer.results] == [documents[row.index] for row in answer.results]
    return [(row.index, row.relevance_score) for row in answer.results]


def cohere_error(url, model, query, documents):
    import cohere

    try:
        cohere.ClientV2(api_key="none", base_url=url).rerank(model=model, query=query, documents=[])
    except cohere.errors.BadRequestError as error:
        return error.body["message"]
    return None


def voyage(url, model, query, documents):
    import voyageai

    answer = voyageai.Client(api_key="none", base_url=f"{url}/v1").rerank(query, documents, model, top_k=3)
    assert answer.total_tokens > 0
    assert [row.document for row in answer.results] == [documents[row.index] for row in answer.results]
    return [(row.index, row.relevance_score) for row in answer.results]


def litellm(provider, path):
    def run(url, model, query, documents):
        import litellm

        answer = litellm.rerank(
            model=f"{provider}/{model}",
            query=query,
            documents=documents,
            top_n=3,
            api_base=f"{url}{path}",
            api_key="none",
        )
        return [(row["index"], row["relevance_score"]) for row in answer.results]

    return run


def langchain_cohere(url, model, query, documents):
    from langchain_cohere import CohereRerank

    client = CohereRerank(model=model, cohere_api_key="none", base_url=url, top_n=3)
    return [(row["index"], row["relevance_score"]) for row in client.rerank(documents, query)]


def llama_index(url, model, query, documents):
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    client = TextEmbeddingInference(base_url=url, model_name=model, top_n=3)
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(i))) for i, text in enumerate(documents)]
    found = client.postprocess_nodes(nodes, QueryBundle(query))
    return [(int(row.node.node_id), row.score) for row in found]


def infinity(url, model, query, documents):
    from infinity_client import Client
    from infinity_client.api.default import rerank
    from infinity_client.models import RerankInput

    body = RerankInput(query=query, documents=documents, model=model, top_n=3)
    answer = asyncio.run(rerank.asyncio(client=Client(base_url=url), body=body))
    return [(row.index, row.relevance_score) for row in answer.results]


CLIENTS = {
    "cohere ClientV2": cohere_v2,
    "cohere Client": cohere_v1,
    "cohere error": cohere_error,
    "voyageai": voyage,
    "litellm hosted_vllm": litellm("hosted_vllm", ""),
    "litellm infinity": litellm("infinity", "/infinity"),
    "litellm cohere": litellm("cohere", ""),
    "litellm jina_ai": litellm("jina_ai", "/v1/rerank"),
    "langchain CohereRerank": langchain_cohere,
    "llama_index TEI": llama_index,
    "infinity_client": infinity,
}


def main() -> None:
    asked = json.load(sys.stdin)
    answers = {}
    for name, client in CLIENTS.items():
        try:
            answers[name] = client(asked["url"], asked["model"], asked["query"], asked["documents"])
        except Exception as error:  # one library that fails must not hide the others
            answers[name] = f"{type(error).__name__}: {error}"
    json.dump(answers, sys.stdout)


main()
