"""What operators see, of the real server: numbers, times, traces, and that the dashboard and the alerts name
nothing else.
"""

import base64
import contextlib
import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from tests.conftest import ROOT
from tests.support import checkpoints, multimodal
from tests.support.checkpoints import sentence_transformer
from tests.support.multimodal import encoded, picture
from tests.support.otlp import collector
from tests.support.server import serve, wait_until
from triton_embeddings import models

OPERATIONS = ROOT / "docs" / "operations"
# The server tells of GPUs only where it sees one.
OF_GPUS = {"nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes", "nv_gpu_utilization"}
PHASES = {"receive", "admission", "tokenise", "queue", "encode", "head", "serialise", "total"}
TEXT = "the value of this class"
_PREFIX = "triton_embeddings_encoder_"


@pytest.fixture(scope="module")
def traces():
    with collector() as made:
        yield made


@pytest.fixture(scope="module")
def serving(tmp_path_factory, traces):
    folder = tmp_path_factory.mktemp("observation")
    sentence_transformer(folder / "tiny", {"pooling_mode": "mean"})
    checkpoints.classifier(folder / "fused", checkpoints.distilbert, 3, ("good", "bad", "ugly"))
    multimodal.clip(folder / "clip")
    options = {"dtype": "float32"}
    models.add(folder / "models", str(folder / "tiny"), "tiny", {**options, "task": "embed"})
    models.add(folder / "models", str(folder / "fused"), "fused", {**options, "fuse_heads": True})
    models.add(folder / "models", str(folder / "clip"), "clip", options)
    with serve(
        folder / "output",
        "--model-repository",
        folder / "models",
        GATEWAY_OTLP_ENDPOINT=traces.url,
        GATEWAY_LOG_FORMAT="json",
        GATEWAY_ACCESS_LOG="true",
        GATEWAY_CANARY_INTERVAL_S="600",
        # An encoder that answers nobody is asked by its watch, and that would be counted.
        GATEWAY_PATIENCE_S="6000",
        OTEL_BSP_SCHEDULE_DELAY="200",
    ) as running:
        yield running


def ask(serving, body, path="/v1/embeddings", **headers):
    """Headers of an answer."""
    given = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(serving.url + path, json.dumps(body).encode(), given)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.headers


def phases(headers):
    parts = (part.split(";dur=") for part in headers["server-timing"].split(", "))
    return {name: float(duration) for name, duration in parts}


@pytest.mark.parametrize(
    ("model", "path", "more"), [("tiny", "/v1/embeddings", {}), ("fused", "/v1/classify", {})]
)
def test_a_requests_own_times_add_up(serving, model, path, more):
    took = phases(ask(serving, {"model": model, "input": TEXT, **more}, path))
    assert set(took) == PHASES
    assert all(duration >= 0 for duration in took.values())
    total = took.pop("total")
    assert took["encode"] > 0
    # What is between the phases is the gateway's own work.
    assert 0.5 * total < sum(took.values()) <= total + 0.01


def test_a_request_that_is_cut_into_many_has_the_times_of_one(serving):
    took = phases(ask(serving, {"model": "tiny", "input": [TEXT] * 500}))
    total = took.pop("total")
    assert sum(took.values()) <= total + 0.01


def test_making_an_image_ready_is_a_phase(serving):
    image = "data:image/png;base64," + base64.b64encode(encoded(picture(90, 40, 1))).decode()
    took = phases(ask(serving, {"model": "clip", "input": [{"image": image}]}))
    assert set(took) == PHASES | {"image"}
    assert took["image"] > 0
    total = took.pop("total")
    assert sum(took.values()) <= total + 0.01
    assert "image" not in phases(ask(serving, {"model": "clip", "input": TEXT}))


def test_times_are_each_requests_own_under_load(serving):
    """A request of one short text that waits for others has waited, and not computed, so long."""
    with ThreadPoolExecutor(8) as pool:
        bodies = [{"model": "tiny", "input": [TEXT] * 64}] * 7 + [{"model": "tiny", "input": "a"}]
        answers = list(pool.map(lambda body: phases(ask(serving, body)), bodies))
    assert all(sum(one.values()) <= 2 * one["total"] + 0.02 for one in answers)
    assert answers[-1]["tokenise"] < answers[0]["tokenise"]


def told_of_all(serving, model):
    """A scrape with the tokens of all answers and of the canary; the encoder tells a second later."""
    found = serving.scrape()
    answered = found.get(("triton_embeddings_tokens_total", model), 0)
    return found if found[_PREFIX + "pass_tokens_sum", model] > answered else None


def test_one_scrape_tells_of_the_gateway_the_encoders_and_the_server(serving):
    model = ("model", "tiny")
    before = wait_until(lambda: told_of_all(serving, model), "the encoder's earlier numbers", 20)
    headers = ask(serving, {"model": "tiny", "input": [TEXT, TEXT]})
    assert headers["x-request-id"]

    def grown(name, *labels):
        return serving.scrape().get((name, *labels), 0) - before.get((name, *labels), 0)

    tokens = grown("triton_embeddings_tokens_total", model)
    assert tokens == 2 * 7
    wait_until(lambda: grown(_PREFIX + "pass_tokens_sum", model) == tokens, "the encoder's numbers", 20)
    assert grown(_PREFIX + "turns_total", model) == 1
    assert grown("nv_inference_count", ("model", "tiny"), ("version", "1")) == 2, "texts"
    label = ("model", "tiny"), ("route", "/v1/embeddings"), ("status", "200")
    assert grown("triton_embeddings_requests_total", *label) == 1
    assert grown("triton_embeddings_phase_duration_seconds_count", model, ("phase", "encode")) == 1
    assert before["triton_embeddings_model_up", model] == 1


def names_in(expression):
    """Metric names of a PromQL expression: words that are no function, keyword, label or duration."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", bare)
    words = re.findall(r"[a-zA-Z_:][\w:]*(?!\w)(?!\s*\()", bare)
    return {word for word in words if word not in {"and", "or", "unless", "sum", "by"}}


def expressions():
    dashboard = json.loads((OPERATIONS / "grafana.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((OPERATIONS / "alerts.yml").read_text())["groups"][0]["rules"]
    return found + [rule["expr"] for rule in rules]


def test_names_are_found_in_expressions():
    text = 'histogram_quantile(0.9, sum by (le) (rate(a_bucket{m="x y"}[5m]))) / (b > 0) or c_total'
    assert names_in(text) == {"a_bucket", "b", "c_total"}


def test_every_metric_of_the_dashboard_and_the_alerts_exists(serving):
    ask(serving, {"model": "tiny", "input": TEXT})
    wanted = set().union(*map(names_in, expressions()))
    assert len(wanted) > 25
    told = {name for name, *_ in serving.scrape()}
    # Prometheus' own, of what it scrapes.
    assert wanted - told - OF_GPUS == {"up"}


def test_every_metric_of_ours_is_on_the_dashboard(serving):
    ask(serving, {"model": "tiny", "input": TEXT})
    shown = set().union(*map(names_in, expressions()))
    told = {name for name, *_ in serving.scrape() if name.startswith("triton_embeddings_")}
    # Of a histogram one of its three is enough.
    rest = {name for name in told - shown if not name.endswith(("_count", "_sum"))}
    assert rest == set()


def test_alerts_say_what_to_do():
    rules = yaml.safe_load((OPERATIONS / "alerts.yml").read_text())["groups"][0]["rules"]
    assert len(rules) == 5
    for rule in rules:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert set(rule["annotations"]) == {"summary", "description"}


STAGES = {"tiny", "tiny.tokenizer", "tiny.encoder", "tiny.dense"}


def spans_of_one(serving, traces, name, **headers):
    """Name -> span, of a request that is called so."""
    ask(
        serving,
        {"model": "tiny", "input": TEXT},
        path="/v1/embeddings?q=secret",
        **{"x-request-id": name},
        **headers,
    )
    traced = [*STAGES, "POST /v1/embeddings"]

    def found():
        roots = [span for span in traces.spans if span.attributes.get("request.id") == name]
        of_trace = traces.of_trace(roots[0].trace_id) if roots else []
        return {span.name: span for span in of_trace}

    with contextlib.suppress(AssertionError):
        wait_until(lambda: found().keys() >= set(traced), "all spans", 30)
    return found()


@pytest.mark.parametrize("parent", [None, "c"])
def test_one_trace_from_the_request_to_every_stage(serving, traces, parent):
    # The server overlooks the traceparent of one request in two hundred: then there is none of its spans.
    for attempt in "123":
        parent_trace = parent and (parent + attempt) * 16
        given = {"traceparent": f"00-{parent_trace}-{'b' * 16}-01"} if parent else {}
        name = f"trace-{parent}-{attempt}"
        spans = spans_of_one(serving, traces, name, **given)
        if not spans.keys().isdisjoint(STAGES):
            break
    assert spans.keys() >= STAGES
    root = spans["POST /v1/embeddings"]
    assert root.service == "triton-embeddings-gateway"
    assert root.parent_id == ("b" * 16 if parent else "")
    assert parent_trace in (None, root.trace_id)
    assert spans["tiny"].attributes["triton.request_id"] == name
    assert spans["InferRequest"].parent_id == root.span_id
    assert spans["tiny.encoder"].parent_id == spans["tiny"].span_id
    assert root.attributes["gen_ai.request.model"] == "tiny"
    assert float(root.attributes["phase.encode_ms"]) > 0
    assert TEXT not in str(spans)
    assert "secret" not in str(spans)


def test_a_request_whose_trace_is_not_wanted_is_not_traced(serving, traces):
    unwanted = "d" * 32
    for trace, flag in ((unwanted, "00"), ("e1" * 16, "01"), ("e2" * 16, "01"), ("e3" * 16, "01")):
        ask(serving, {"model": "tiny", "input": TEXT}, traceparent=f"00-{trace}-{'b' * 16}-{flag}")
    wanted = ("e1" * 16, "e2" * 16, "e3" * 16)
    wait_until(lambda: any(len(traces.of_trace(one)) >= 9 for one in wanted), "a trace that is wanted", 60)
    assert traces.of_trace(unwanted) == []
    assert traces.kinds == {"application/json", "application/x-protobuf"}


def test_probes_and_canaries_are_not_traced(traces):
    assert not [s.name for s in traces.spans if re.search("ready|health|metrics", s.name)]
    assert all(traces.of_trace(s.trace_id) for s in traces.spans)


def test_lines_of_the_log_are_json_and_quote_nobody(serving):
    secret = "a text that nobody else sends"
    ask(serving, {"model": "tiny", "input": secret}, **{"x-request-id": "quoted"})

    def lines():
        # Only whole ones: the gateway writes them after the answer.
        found = [
            line for line in serving.output.read_text().splitlines(True) if line[0] + line[-2:] == "{}\n"
        ]
        return [one for one in map(json.loads, found) if one.get("request_id") == "quoted"]

    (line,) = wait_until(lines, "the line of the request", 20)
    assert (line["route"], line["model"], line["status"]) == ("/v1/embeddings", "tiny", 200)
    assert line["logger"] == "gateway.access"
    assert secret not in serving.output.read_text()
    assert secret not in serving.server_log()
