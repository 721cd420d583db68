"""What an encoder tells the server of its work, with a stand-in for the server's module. tests/server scrapes
the real one.
"""

import threading

import numpy as np
import pytest

from backends.stages import server_counters
from backends.stages.encoder import EncoderStage
from backends.stages.server_counters import ServerCounters
from backends.tally import Count, Tally
from tests.backends.test_stages import start
from tests.support import decoders
from tests.support.checkpoints import mpnet, sentence_transformer
from tests.support.fake_pb_utils import MetricFamily, Request, TritonModelException, answers

PREFIX = "triton_embeddings_encoder_"


def told(name):
    (metric,) = MetricFamily.made[PREFIX + name].metrics
    return metric.value


def passes():
    return {m.labels["le"]: m.value for m in MetricFamily.made[PREFIX + "pass_tokens_bucket"].metrics}


def encode(stage, *rows):
    ids = np.array([[token for row in rows for token in row]], np.int32)
    length = np.array([[len(row) for row in rows]], np.int32)
    request = Request({"input_ids": ids, "length": length}, wanted=("hidden", "last_hidden", "encoder_times"))
    (answer,) = answers(stage, [request])
    assert answer.error is None
    return answer


@pytest.fixture
def path(tmp_path):
    return sentence_transformer(tmp_path / "c", {"pooling_mode": "mean"})


def test_passes_are_counted_once_each(path):
    stage = start(EncoderStage(), path, max_batch_tokens="8", heads="dense", served_model_name="org/m")
    encode(stage, [1, 2, 3], [4, 5])
    encode(stage, [1] * 20, [2])
    stage.finalize()
    assert told("pass_tokens_sum") == 26
    assert told("pass_tokens_count") == told("turns_total") == 3
    assert passes() == {"16": 2, **dict.fromkeys(["64", "256", "1024", "4096", "16384", "65536", "+Inf"], 3)}
    assert told("shared_prefix_tokens_total") == 0
    assert told("padding_tokens_total") == (8 - 5) + (24 - 20) + (8 - 1), "short rows are filled up"
    assert told("out_of_memory_retries_total") == told("expired_requests_total") == 0
    assert MetricFamily.made[PREFIX + "turns_total"].metrics[0].labels == {"model": "org/m"}


def test_padding_is_counted(tmp_path):
    path = sentence_transformer(tmp_path / "c", {"pooling_mode": "mean"}, base=mpnet)
    stage = start(EncoderStage(), path, heads="dense")
    encode(stage, [5, 6, 7, 8], [5, 6], [5])
    stage.finalize()
    assert told("padding_tokens_total") == 2 + 3
    assert told("pass_tokens_sum") == 7


def test_tokens_that_were_shared_are_counted(tmp_path):
    path = decoders.qwen3_embedding(tmp_path / "c")
    stage = start(EncoderStage(), path, heads="dense", dtype="float32")
    shared = list(range(5, 35))
    encode(stage, [*shared, 40], [*shared, 41, 42])
    stage.finalize()
    assert told("shared_prefix_tokens_total") == 30
    assert told("pass_tokens_sum") == 33


def test_the_thread_that_computes_waits_for_nobody(path, monkeypatch):
    """A server that takes an update only when it is allowed to, while answers go out."""
    gate = threading.Event()
    increment = server_counters.pb_utils.MetricFamily.Metric

    def slow(self, labels):
        metric = increment(self, labels)
        add = metric.increment
        metric.increment = lambda amount: (gate.wait(60), add(amount))
        return metric

    monkeypatch.setattr(MetricFamily, "Metric", slow)
    monkeypatch.setattr(server_counters, "_INTERVAL_S", 0.01)
    stage = start(EncoderStage(), path, heads="dense")
    for _ in range(5):
        encode(stage, [1, 2, 3])
    assert told("turns_total") == 0
    gate.set()
    stage.finalize()
    assert told("turns_total") == 5


def test_a_server_without_metrics_gets_none(monkeypatch):
    def refuse(**given):
        raise TritonModelException("metrics are off")

    monkeypatch.setattr(MetricFamily, "__init__", lambda self, **given: refuse())
    tally = Tally()
    counters = ServerCounters({"model": "m"}, tally)
    tally.add(Count.TURNS)
    counters.stop()
    assert tally.take()[0] == {Count.TURNS: 1}, "nobody takes what cannot be told"


def test_the_moments_of_a_request_come_in_order(path):
    stage = start(EncoderStage(), path, heads="dense")
    came, begun, done = encode(stage, [1, 2, 3]).value("encoder_times")[0]
    assert 0 < came <= begun <= done
    later = encode(stage, [1, 2, 3]).value("encoder_times")[0]
    assert later[0] >= done
    stage.finalize()
