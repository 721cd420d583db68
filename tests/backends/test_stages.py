"""The stages with a stand-in for the server's module. tests/server runs them inside the real one."""

import json
import logging

import numpy as np
import pytest
import torch

from backends.errors import RequestError
from backends.stages.base import Stage
from backends.stages.encoder import EncoderStage
from backends.stages.head import HeadStage
from backends.stages.tokenizer import TokenizerStage
from tests.support import decoders
from tests.support.checkpoints import bert, classifier, sentence_transformer
from tests.support.fake_pb_utils import Request, TritonModelException

PROMPTS = {"prompts": {"query": "query: "}}


def start(stage, path, **parameters):
    strings = {"checkpoint": str(path), **parameters}
    stage.initialize(
        {
            "model_name": "tiny.stage",
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_config": json.dumps({"parameters": {k: {"string_value": v} for k, v in strings.items()}}),
        }
    )
    return stage


@pytest.fixture
def path(tmp_path):
    return sentence_transformer(tmp_path / "c", {"pooling_mode": "mean"}, sentence=PROMPTS)


def text(*texts, **parameters):
    column = np.array([[t if isinstance(t, bytes) else t.encode()] for t in texts], object)
    return Request({"text": column}, parameters)


def test_tokenizer_answers_each_request_as_its_parameters_say(path):
    stage = start(TokenizerStage(), path)
    plain, prompted, left = stage.execute(
        [text("a b", "c"), text("a b", prompt_name="query"), text("a " * 99, truncation="left")]
    )
    assert plain.value("length").tolist() == [[4, 3]]
    assert plain.value("input_ids").shape == (1, 7)
    assert plain.value("n_tokens").tolist() == [[4], [3]]
    assert plain.value("truncated").tolist() == [[False], [False]]
    assert prompted.value("length").tolist() == [[6]]
    assert left.value("truncated").tolist() == [[True]]
    assert left.value("length").tolist() == [[48]]


def test_only_what_somebody_reads_is_sent(path):
    stage = start(TokenizerStage(), path)
    request = text("a")
    request.wanted = ("input_ids", "prompt_length")
    (answer,) = stage.execute([request])
    assert [tensor.name for tensor in answer.output_tensors] == ["input_ids", "prompt_length"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (text("fine", "a " * 99), "context_length_exceeded at item 1: the text has 101 tokens"),
        (text(b"\xff"), "invalid_input at item 0: the text is not UTF-8"),
        (text("a", prompt_name="none"), "unknown_prompt: prompt_name is 'none'"),
        (
            text("a", instruction="find"),
            "invalid_instruction: this model was not made for instructions; leave instruction out, or put",
        ),
        (Request({"text": np.array([[b"a", b"b"]], object)}), "invalid_input: text has shape [1, 2]"),
        (Request({}), "invalid_input: the input text is missing"),
    ],
)
def test_a_bad_request_is_one_error_and_its_neighbours_live(path, bad, message):
    stage = start(TokenizerStage(), path)
    before, failed, after = stage.execute([text("a"), bad, text("b")])
    assert failed.error.message.startswith(message)
    assert failed.error.code == "INVALID_ARG"
    assert before.error is None
    assert after.value("length").tolist() == [[3]]


def test_pairs_go_into_the_prompt_of_a_reranker_and_only_there(tmp_path):
    pair = np.array([[b"a", b"b"]], object)
    asked = Request({"text": pair}, {"instruction": "find"})
    words = start(TokenizerStage(), decoders.qwen3_reranker(tmp_path / "words"), heads="logits")
    plain, instructed, single = words.execute([Request({"text": pair}), asked, text("a", instruction="find")])
    assert plain.value("length")[0, 0] > 100
    assert plain.value("input_ids").tolist() != instructed.value("input_ids").tolist()
    assert "was not made for instructions" in single.error.message, "a text alone goes in as it stands"
    labels = start(TokenizerStage(), classifier(tmp_path / "labels", bert), heads="logits")
    (refused,) = labels.execute([asked])
    assert refused.error.message == (
        "invalid_instruction: this model was not made for instructions; leave instruction out"
    )


def test_an_encoder_sends_only_the_tokens_that_its_heads_read(tmp_path):
    path = decoders.qwen3_embedding(tmp_path / "c")
    whole = start(EncoderStage(), path, dtype="float32", heads="dense,tokens")
    last = start(EncoderStage(), path, dtype="float32", heads="dense")
    rows = [np.arange(5, 5 + n) for n in (4, 9, 2)]
    requests = [encoded(None, rows[0], rows[1]), encoded(None, rows[2])]
    hidden = [np.asarray(answer.value("hidden"))[0] for answer in whole.execute(requests)]
    short = [np.asarray(answer.value("last_hidden"))[0] for answer in last.execute(requests)]
    np.testing.assert_allclose(short[0], hidden[0][[3, 12]], atol=1e-6)
    np.testing.assert_allclose(short[1], hidden[1][[1]], atol=1e-6)
    plain = start(HeadStage(), path, dtype="float32", head="dense")
    reading = start(HeadStage(), path, dtype="float32", head="dense", reads="last_hidden")
    for given, states, n in zip(requests, hidden, (2, 1), strict=True):
        (expected,) = plain.execute([Request({"hidden": states[None], "length": given.inputs["length"]})])
        ends = [3, 12] if n == 2 else [1]
        (got,) = reading.execute([Request({"last_hidden": states[None][:, ends]})])
        np.testing.assert_allclose(got.value("dense"), expected.value("dense"), atol=1e-6)


def encoded(stage, *rows):
    return Request(
        {
            "input_ids": np.concatenate(rows)[None].astype(np.int32),
            "length": np.array([[len(row) for row in rows]], np.int32),
        }
    )


@pytest.mark.parametrize(
    ("dtype", "wire"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float32)]
)
def test_encoder_gives_each_request_its_own_hidden_states(path, dtype, wire):
    stage = start(EncoderStage(), path, dtype=dtype, threads="1")
    rows = [np.arange(5, 5 + n) for n in (4, 9, 2)]
    together = stage.execute([encoded(stage, rows[0], rows[1]), encoded(stage, rows[2])])
    alone = [stage.execute([encoded(stage, row)])[0] for row in rows]

    def hidden(answer):
        return torch.as_tensor(answer.value("hidden")).float()

    assert torch.as_tensor(alone[0].value("hidden")).dtype is wire
    assert hidden(together[0]).shape == (1, 13, 32)
    tolerance = 1e-5 if dtype == "float32" else 0.1
    torch.testing.assert_close(
        hidden(together[0])[0],
        torch.cat([hidden(alone[0])[0], hidden(alone[1])[0]]),
        atol=tolerance,
        rtol=tolerance,
    )
    torch.testing.assert_close(hidden(together[1]), hidden(alone[2]), atol=tolerance, rtol=tolerance)


def test_encoder_answers_a_batch_over_its_memory_in_parts(path):
    stage = start(EncoderStage(), path, dtype="float32", max_batch_tokens="5", threads="1")
    assert torch.get_num_threads() == 1
    rows = [np.arange(5, 5 + n) for n in (9, 8, 4, 21, 3)]
    requests = [encoded(stage, row) for row in rows]
    responses = stage.execute(requests)
    # At most 20 tokens at once, one longer request alone: (9, 8), (4), (21), (3).
    assert [len(request.sent) for request in requests] == [1, 1, 1, 1, 0]
    assert [response is None for response in responses] == [True, True, True, True, False]
    answers = [request.sent[0] for request in requests[:4]] + responses[4:]
    for row, answer in zip(rows, answers, strict=True):
        (alone,) = stage.execute([encoded(stage, row)])
        np.testing.assert_allclose(answer.value("hidden"), alone.value("hidden"), atol=1e-5)


def test_head_groups_by_parameters_and_keeps_order(path):
    stage = start(HeadStage(), path, head="dense")
    generator = np.random.default_rng(0)

    def request(n, **parameters):
        hidden = generator.standard_normal((1, 3 * n, 32)).astype(np.float32)
        return Request({"hidden": hidden, "length": np.full((1, n), 3, np.int32)}, parameters)

    requests = [
        request(1),
        request(2, dimensions=8),
        request(1, normalize=False),
        request(3),
        request(1, dimensions=99),
    ]
    answers = stage.execute(requests)
    assert [None if a.error else a.value("dense").shape for a in answers] == [
        (1, 32),
        (2, 8),
        (1, 32),
        (3, 32),
        None,
    ]
    assert answers[4].error.message == "invalid_dimensions: dimensions is 99; this model takes 1 to 32"
    for given, answer in zip(requests[:4], answers[:4], strict=True):
        alone = stage.execute([given])[0]
        np.testing.assert_allclose(answer.value("dense"), alone.value("dense"), atol=1e-6)
    assert np.abs(np.linalg.norm(answers[2].value("dense")) - 1) > 0.05


class Fragile(Stage):
    """Breaks on a batch with a bad request in it, wherever that is."""

    def setup(self, context):
        pass

    def run(self, batch):
        if any("bad" in request.parameters for request in batch):
            raise ZeroDivisionError("secret detail")
        return [{"dense": np.ones((1, 1))} for _ in batch]


def test_an_unknown_exception_spares_the_neighbours_and_leaks_nothing(path, caplog):
    stage = start(Fragile(), path)
    requests = [Request({}), Request({}, {"bad": True}), Request({})]
    with caplog.at_level(logging.ERROR):
        answers = stage.execute(requests)
    assert [answer.error is None for answer in answers] == [True, False, True]
    assert answers[1].error.message.startswith("internal: the model failed on this request")
    assert answers[1].error.code == "INTERNAL"
    assert "secret" not in answers[1].error.message
    assert "ZeroDivisionError: secret detail" in caplog.text


def test_a_refusal_that_is_raised_is_an_answer_too(path):
    class Refusing(Fragile):
        def run(self, batch):
            raise RequestError("invalid_input", "no")

    (answer,) = start(Refusing(), path).execute([Request({})])
    assert answer.error.message == "invalid_input: no"


def test_a_broken_checkpoint_is_the_server_s_own_exception_in_one_line(path):
    (path / "config.json").unlink()
    with pytest.raises(TritonModelException, match=r"has no config\.json") as caught:
        start(TokenizerStage(), path)
    assert "\n" not in str(caught.value)
