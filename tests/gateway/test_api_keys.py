import hashlib
import json
import os
import time

import httpx
import openai
import pytest

from gateway.access import Door, door_of
from gateway.app import create_app
from gateway.budget import Budget, Budgets
from gateway.endpoints import DIALECTS
from gateway.errors import Forbidden
from gateway.keys import Key, Keys, UnusableKeys, digest_of, read_keys
from gateway.settings import Settings
from tests.gateway.conftest import running
from tests.support.fake_inference import CLASSIFIER, KINDS, PIPELINE, RERANKER, FakeInference

PLAIN = "sk-open-sesame"
BEARER = {"Authorization": f"Bearer {PLAIN}"}
BODY = {"input": ["Hello"]}


def entry(name, key, **what):
    return {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), **what}


def write(file, *entries):
    file.write_text(json.dumps(entries))
    # Two writes within one tick of the file system's clock look alike.
    write.tick += 1
    os.utime(file, ns=(write.tick, write.tick))


write.tick = 1


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture
async def guarded():
    """A gateway that asks for one key, and serves something for every route."""
    inference = FakeInference([KINDS, RERANKER, CLASSIFIER])
    async with running(inference, api_key=PLAIN, admin_key="the-operators-own") as client:
        yield client


@pytest.mark.parametrize(
    "headers",
    [
        BEARER,
        {"Authorization": PLAIN},
        {"Authorization": f"bearer   {PLAIN} "},
        {"api-key": PLAIN},
        {"x-api-key": PLAIN},
        {"Authorization": "Basic bm9uZTpub25l", "X-Api-Key": PLAIN},
    ],
)
async def test_a_key_is_read_wherever_clients_put_it(guarded, headers):
    assert (await guarded.post("/v1/embeddings", json=BODY, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "code", "told"),
    [
        ({}, "missing_api_key", "Authorization: Bearer KEY"),
        ({"Authorization": "Bearer "}, "missing_api_key", "Authorization: Bearer KEY"),
        ({"Authorization": "Bearer sk-guessed"}, "invalid_api_key", "not known here"),
        ({"Authorization": f"Bearer {PLAIN}x"}, "invalid_api_key", "not known here"),
        ({"Authorization": "Bearer the-operators-own"}, "invalid_api_key", "not known here"),
        ({"Authorization": "Bearer schlüssel".encode()}, "invalid_api_key", "not known here"),
    ],
)
async def test_without_a_known_key_nothing_is_answered(guarded, headers, code, told):
    answer = await guarded.post("/v1/embeddings", json=BODY, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", code)
    assert told in error["message"]
    assert "guessed" not in answer.text


# How each dialect tells of an error: where the message is in its body.
MESSAGES = {
    "openai": lambda body: body["error"]["message"],
    "hybrid": lambda body: body["error"]["message"],
    "score": lambda body: body["error"]["message"],
    "classify": lambda body: body["error"]["message"],
    "rtp_llm": lambda body: body["message"] if body["error_code_str"].startswith("507_") else "",
    "tei": lambda body: body["error"] if body["error_type"] == "Validation" else "",
    "cohere": lambda body: body["message"],
    "rerank": lambda body: body["message"] if body["detail"] == body["error"]["message"] else "",
}
OWN = {"/v1/reranker": "rtp_llm", "/v1/classifier": "rtp_llm", "/predict": "tei"}


def _routes():
    for name, dialect in DIALECTS.items():
        for route in dialect.router.routes:
            for method in sorted(route.methods - {"HEAD"}):
                if door_of(method, route.path) is Door.API:
                    yield method, route.path.replace("{model:path}", "org/m3"), OWN.get(route.path, name)


@pytest.mark.parametrize(("method", "path", "dialect"), list(_routes()))
async def test_every_route_refuses_in_its_own_words(guarded, method, path, dialect):
    answer = await guarded.request(method, path, json=BODY)
    assert answer.status_code == 401
    assert "an API key is asked for here" in MESSAGES[dialect](answer.json())


@pytest.mark.parametrize(
    ("path", "body", "dialect"),
    [
        ("/v1/embeddings", BODY, "openai"),
        ("/v1/embeddings/hybrid", BODY, "hybrid"),
        ("/v1/embeddings/dense", BODY, "rtp_llm"),
        ("/v1/reranker", {"query": "a", "documents": ["b"]}, "rtp_llm"),
        ("/v1/classifier", {"input": "a"}, "rtp_llm"),
        ("/embed", {"inputs": "a"}, "tei"),
        ("/predict", {"inputs": "a"}, "tei"),
        ("/rerank", {"query": "a", "texts": ["b"]}, "tei"),
        ("/v2/embed", {"texts": ["a"]}, "cohere"),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, "rerank"),
        ("/v1/score", {"text_1": "a", "text_2": "b"}, "score"),
        ("/v1/classify", {"input": "a"}, "classify"),
    ],
)
async def test_a_model_that_a_key_may_not_use_is_refused_in_each_dialect(file, path, body, dialect):
    write(file, entry("alice", PLAIN, models=["org/tiny"]))
    inference = FakeInference([PIPELINE, KINDS, RERANKER, CLASSIFIER])
    async with running(inference, api_keys_file=file) as client:
        models = ("org/m3", "org/reranker", "org/classifier")
        for model in models:
            answer = await client.post(path, json={"model": model, **body}, headers=BEARER)
            assert answer.status_code == 403
            assert MESSAGES[dialect](answer.json()) == (
                f"the key 'alice' may not use the model '{model}'; it may use: org/tiny"
            )
    assert inference.calls == []


async def test_a_key_sees_and_gets_only_its_own_models(file):
    write(file, entry("alice", PLAIN, models=["org/tiny"]), entry("bob", "bob's-own-key", models=["nothing"]))
    async with running(FakeInference([KINDS, PIPELINE]), api_keys_file=file) as client:
        listed = (await client.get("/v1/models", headers=BEARER)).json()["data"]
        assert [model["id"] for model in listed] == ["org/tiny"]
        # Without a name, org/m3 is the first for everybody else.
        answer = await client.post("/v1/embeddings", json=BODY, headers=BEARER)
        assert answer.json()["model"] == "org/tiny"
        assert (await client.get("/info", headers=BEARER)).json()["model_id"] == "org/tiny"
        assert (await client.get("/v1/models/org/m3", headers=BEARER)).status_code == 403
        unknown = await client.post("/v1/embeddings", json={**BODY, "model": "x"}, headers=BEARER)
        assert unknown.status_code == 404
        assert unknown.json()["error"]["message"].endswith("there are: org/tiny")
        sparse = await client.post("/embed_sparse", json={"inputs": "a"}, headers=BEARER)
        assert sparse.status_code == 400
        assert "org/m3" not in sparse.text
        nothing = await client.post("/v1/embeddings", json=BODY, headers={"api-key": "bob's-own-key"})
        assert nothing.status_code == 403
        assert "none of those that it may use is loaded here" in nothing.text


async def test_the_clients_of_others_raise_their_own_errors(file):
    write(file, entry("alice", PLAIN, models=["org/reranker"], tokens_per_minute=1))
    app = create_app(Settings(api_keys_file=file), FakeInference([PIPELINE, RERANKER]))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        for key, model, kind in (
            ("sk-wrong-one", "org/tiny", openai.AuthenticationError),
            (PLAIN, "org/tiny", openai.PermissionDeniedError),
        ):
            client = openai.AsyncOpenAI(
                api_key=key, base_url="http://gateway/v1", http_client=httpx.AsyncClient(transport=transport)
            )
            with pytest.raises(kind) as caught:
                await client.embeddings.create(model=model, input="hi")
            assert caught.value.body["message"]


async def test_probes_and_pages_need_no_key(guarded):
    for path in ("/health", "/ready", "/docs", "/openapi.json"):
        assert (await guarded.get(path)).status_code in (200, 503), path
    page = (await guarded.get("/docs")).text
    script = page.partition('src="')[2].partition('"')[0]
    assert (await guarded.get(script)).status_code == 200
    assert (await guarded.get("/")).status_code == 307
    assert (await guarded.post("/", json={"inputs": "a"})).status_code == 401


async def test_the_pages_say_whether_a_key_is_needed(guarded, client):
    document = (await guarded.get("/openapi.json")).json()
    assert "an API key is asked for" in document["info"]["description"]
    assert document["security"] == [{"API key": []}]
    document = (await client.get("/openapi.json")).json()
    assert "no API key is needed" in document["info"]["description"]
    assert "security" not in document


async def test_metrics_and_admin_ask_for_the_operators_key(guarded):
    own = {"Authorization": "Bearer the-operators-own"}
    for path in ("/metrics", "/admin", "/admin/models"):
        for headers in ({}, BEARER):
            answer = await guarded.get(path, headers=headers)
            assert answer.status_code == 401, path
            assert "GATEWAY_ADMIN_KEY" in answer.text
        # Who has the key is let through to whatever is there.
        assert (await guarded.get(path, headers=own)).status_code in (200, 404)


async def test_admin_is_off_without_a_key_and_metrics_are_for_this_machine(client):
    answer = await client.get("/admin/models")
    assert answer.status_code == 403
    assert "switched off" in answer.text
    assert (await client.get("/metrics")).status_code != 403
    async with running(FakeInference(), host="0.0.0.0") as reachable:
        answer = await reachable.get("/metrics")
        assert answer.status_code == 403
        assert "GATEWAY_METRICS=true" in answer.text
    async with running(FakeInference(), host="0.0.0.0", metrics=True) as shown:
        assert (await shown.get("/metrics")).status_code != 403
    async with running(FakeInference(), metrics=False) as hidden:
        assert (await hidden.get("/metrics")).status_code == 403


@pytest.mark.parametrize(
    "path", ["/admin%2Fmodels", "//admin/models", "/Admin", "/health/../v1/models", "/docsx"]
)
async def test_a_path_that_is_written_otherwise_opens_nothing(guarded, path):
    # What no route has is asked for a key like any endpoint.
    assert (await guarded.get(path)).status_code == 401


async def test_a_file_that_changes_counts_at_once_and_a_broken_one_does_not(file, caplog):
    write(file, entry("alice", PLAIN))
    async with running(FakeInference(), api_keys_file=file) as client:

        async def status(key=PLAIN):
            return (await client.post("/v1/embeddings", json=BODY, headers={"api-key": key})).status_code

        assert (await status(), await status("another-key")) == (200, 401)
        write(file, entry("bob", "another-key"))
        assert (await status(), await status("another-key")) == (401, 200)
        file.write_text('[{"name": "bob", "sha256": "another-key"')
        assert await status("another-key") == 200
        assert "the keys stay as they were" in caplog.text
        assert "another-key" not in caplog.text
        assert caplog.text.count("the keys stay") == 1
        assert await status("another-key") == 200
        assert caplog.text.count("the keys stay") == 1, "a broken file is told of once"
        file.unlink()
        assert await status("another-key") == 200
        write(file)
        assert await status("another-key") == 401, "a file without keys lets nobody in"


async def test_a_file_and_the_environment_may_both_have_keys(file):
    write(file, entry("alice", "alice's-key"))
    async with running(FakeInference(), api_keys_file=file, api_key=PLAIN) as client:
        for key in (PLAIN, "alice's-key"):
            answer = await client.post("/v1/embeddings", json=BODY, headers={"api-key": key})
            assert answer.status_code == 200


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not valid JSON"),
        ("{}", "has no list of keys"),
        ('[{"name": "a"}]', "entry 0 (a): sha256: field required"),
        ('[{"name": "a", "sha256": "sk-a-plain-key"}]', "entry 0 (a): sha256 is no hash"),
        (json.dumps([entry("a", "x", model=["m"])]), "entry 0 (a): model: extra inputs are not permitted"),
        (json.dumps([entry("a", "x", models=[])]), "entry 0 (a): models:"),
        (json.dumps([entry("a", "x", lane="fast")]), "entry 0 (a): lane: input should be 'interactive' or"),
        (json.dumps([entry("a", "x", tokens_per_minute=0)]), "tokens_per_minute: input should be greater"),
        (json.dumps([entry("a", "x"), entry("a", "y")]), "two keys of the name 'a'"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_without_its_keys(file, text, told):
    file.write_text(text)
    with pytest.raises(UnusableKeys) as caught:
        read_keys(file)
    assert told in str(caught.value)
    assert "sk-a-plain-key" not in str(caught.value)


def test_toml_is_read_too(tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(f'[[keys]]\nname = "a"\nsha256 = "{digest_of("x").hex()}"\nlane = "bulk"\n')
    assert read_keys(file) == [Key("a", digest_of("x"), lane="bulk")]


def test_what_cannot_be_a_key_is_refused_without_being_shown():
    for key in ("short", "with a blank", "schlüssel-lang"):
        with pytest.raises(UnusableKeys) as caught:
            create_app(Settings(api_key=key))
        assert key not in str(caught.value)
        assert key not in repr(Settings(api_key=key))


def test_all_keys_are_compared_whichever_is_right(monkeypatch):
    compared = []
    monkeypatch.setattr("gateway.keys.hmac.compare_digest", lambda a, b: compared.append(b) or a == b)
    keys = Keys([Key(str(i), digest_of(f"key-{i}")) for i in range(5)])
    for given in ("key-0", "key-4", "none"):
        compared.clear()
        keys.find([given])
        assert len(compared) == 5


async def test_the_lane_and_the_name_of_a_key_reach_the_request(file, monkeypatch):
    from gateway.context import current

    seen = []
    inference = FakeInference()
    answer = inference.infer

    async def infer(*arguments, **options):
        seen.append((current().key_name, current().lane))
        return await answer(*arguments, **options)

    monkeypatch.setattr(inference, "infer", infer)
    write(file, entry("night", PLAIN, lane="bulk"))
    async with running(inference, api_keys_file=file) as client:
        seen.clear()
        await client.post("/v1/embeddings", json=BODY, headers=BEARER)
    assert seen == [("night", "bulk")]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_budget_says_truly_when_it_is_worth_trying_again():
    clock = Clock()
    budget = Budget(600, clock)
    budget.charge(700)
    assert budget.wait_s() == pytest.approx(10)
    clock.now += budget.wait_s() - 0.01
    assert budget.wait_s() > 0
    clock.now += 0.02
    assert budget.wait_s() == 0
    clock.now += 3600
    assert budget.level() == 600, "what is not used does not add up"


def test_a_budget_outlives_a_new_look_at_the_file_but_not_a_new_limit():
    budgets = Budgets(Clock())
    budgets.of("a", 10).charge(5)
    assert budgets.of("a", 10).level() == 5
    assert budgets.of("a", 20).level() == 20


async def test_a_key_that_has_used_its_tokens_waits_for_as_long_as_it_is_told(file):
    write(file, entry("alice", PLAIN, tokens_per_minute=60), entry("bob", "bob's-own-key"))
    async with running(FakeInference(), api_keys_file=file) as client:
        # The stand-in counts bytes as tokens.
        first = await client.post("/v1/embeddings", json={"input": ["x" * 40] * 2}, headers=BEARER)
        assert first.json()["usage"]["total_tokens"] == 80
        assert first.headers["x-ratelimit-limit-tokens"] == "60"
        assert first.headers["x-ratelimit-remaining-tokens"] == "0"
        refused = await client.post("/v1/embeddings", json=BODY, headers=BEARER)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "60 tokens a minute" in refused.json()["error"]["message"]
        # 20 tokens are owed, and one comes back each second.
        assert 19 <= int(refused.headers["retry-after"]) <= 20
        assert 18_000 < int(refused.headers["retry-after-ms"]) <= 20_000
        other = await client.post("/v1/embeddings", json=BODY, headers={"api-key": "bob's-own-key"})
        assert other.status_code == 200
        assert "x-ratelimit-limit-tokens" not in other.headers


async def test_every_kind_of_answer_is_charged(file):
    write(file, entry("alice", PLAIN, tokens_per_minute=600))
    begin = time.monotonic()
    async with running(FakeInference([KINDS, RERANKER, CLASSIFIER]), api_keys_file=file) as client:
        for n, (path, body) in enumerate(
            (
                ("/v1/embeddings", {"input": "a" * 100}),
                ("/embed_sparse", {"inputs": "a" * 100}),
                ("/rerank", {"query": "a" * 10, "documents": ["b" * 90]}),
                ("/v1/classify", {"input": "a" * 100}),
                ("/similarity", {"inputs": {"source_sentence": "a" * 50, "sentences": ["b" * 50]}}),
            ),
            1,
        ):
            answer = await client.post(path, json=body, headers=BEARER)
            left = int(answer.headers["x-ratelimit-remaining-tokens"])
            back = 10 * (time.monotonic() - begin)
            assert 600 - 100 * n <= left + 1 <= 600 - 100 * n + back + 1, path


def test_a_switched_off_door_is_no_matter_of_keys():
    from gateway.access import Access

    access = Access(Settings(host="0.0.0.0"))
    with pytest.raises(Forbidden):
        access.check_admin(["anything"])
    with pytest.raises(Forbidden):
        access.check_metrics(["anything"])
