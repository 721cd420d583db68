"""The page at /docs: what it says must be something that can be sent."""

from gateway.app import create_app
from gateway.settings import Settings
from tests.gateway.conftest import running
from tests.support.fake_inference import CLASSIFIER, KINDS, RERANKER, FakeInference


def references(part):
    if isinstance(part, dict):
        found = [part["$ref"]] if "$ref" in part else []
        return found + [one for value in part.values() for one in references(value)]
    return [one for value in part for one in references(value)] if isinstance(part, list) else []


def posts():
    document = create_app(Settings(), FakeInference()).openapi()
    return document, {
        path: methods["post"] for path, methods in document["paths"].items() if "post" in methods
    }


def test_every_reference_can_be_followed():
    document, _ = posts()
    assert "$ref" in str(document), "nothing is checked"
    for reference in references(document):
        part = document
        for step in reference.removeprefix("#/").split("/"):
            part = part[step]


async def test_every_example_is_answered_with_what_it_shows():
    _, routes = posts()
    assert len(routes) >= 20
    async with running(FakeInference([KINDS, RERANKER, CLASSIFIER])) as client:
        for path, route in routes.items():
            request = route["requestBody"]["content"]["application/json"]
            shown = route["responses"]["200"]["content"]["application/json"]
            answer = await client.post(path, json=request["example"])
            assert answer.status_code == 200, f"{path}: {answer.text}"
            got = answer.json()
            assert type(got).__name__ == {"array": "list", "object": "dict"}[shown["schema"]["type"]], path
            if isinstance(got, dict):
                assert set(shown["example"]) <= set(got), path
