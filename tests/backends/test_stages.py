"""The stages with a stand-in for the server's module. tests/server runs them inside the real one."""

import gc
import json
import logging
import re
import threading

import numpy as np
import pytest
import torch

from backends import lean_imports
from backends.errors import RequestError
from backends.stages import response
from backends.stages.base import Stage
from backends.stages.encoder import EncoderStage
from backends.stages.head import HeadStage
from backends.stages.tokenizer import TokenizerStage
from backends.tally import Count
from tests.support import decoders
from tests.support.checkpoints import bert, classifier, own_code, sentence_transformer
from tests.support.fake_pb_utils import InferenceRequest, Request, TritonModelException, answers
from tests.support.figures import show

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


def test_a_checkpoints_own_code_gets_torch_whole(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(lean_imports, "undo", lambda: calls.append("undo"))
    monkeypatch.setattr(lean_imports, "finish", lambda: calls.append("finish"))
    start(HeadStage(), sentence_transformer(tmp_path / "plain", {"pooling_mode": "mean"}), head="dense")
    assert calls == ["finish"]
    calls.clear()
    start(HeadStage(), own_code(tmp_path / "own"), head="dense", trust_remote_code="true")
    assert calls == ["undo", "finish"]


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
    hidden = [np.asarray(answer.value("hidden"))[0] for answer in answers(whole, requests)]
    short = [np.asarray(answer.value("last_hidden"))[0] for answer in answers(last, requests)]
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
    together = answers(stage, [encoded(stage, rows[0], rows[1]), encoded(stage, rows[2])])
    alone = [answers(stage, [encoded(stage, row)])[0] for row in rows]

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


def test_inputs_may_lie_on_a_device(path):
    """As those of a client that shares memory of a GPU; numpy cannot read it."""
    stage = start(EncoderStage(), path, threads="1")
    given = encoded(stage, np.arange(5, 9))
    there = Request({name: torch.from_numpy(value) for name, value in given.inputs.items()})
    (expected,), (got,) = answers(stage, [given]), answers(stage, [there])
    np.testing.assert_array_equal(got.value("hidden"), expected.value("hidden"))


def test_a_request_of_many_texts_takes_several_turns(path):
    stage = start(EncoderStage(), path, dtype="float32", max_batch_tokens="12", threads="1")
    lengths = [9, 8, 4, 21, 3, 4, 1]
    rows = [np.arange(5, 5 + n) for n in lengths]
    turns = []
    compute = stage.compute

    def watched(pieces):
        assert torch.get_num_threads() == 1
        turns.append([int(piece.job.lengths[piece.places].sum()) for piece in pieces])
        return compute(pieces)

    stage.compute = watched
    (whole,) = answers(stage, [encoded(stage, *rows)])
    assert turns == [[21], [9], [12], [8]], "at most 12 tokens a turn, or one longer text"
    alone = [answers(stage, [encoded(stage, row)])[0].value("hidden")[0] for row in rows]
    np.testing.assert_allclose(whole.value("hidden")[0], np.concatenate(alone), atol=1e-5)


def test_a_short_request_does_not_wait_for_a_long_one(path):
    stage = start(EncoderStage(), path, dtype="float32", max_batch_tokens="10", threads="1")
    order, entered, may_go = [], threading.Event(), threading.Event()
    compute = stage.compute

    def held(pieces):
        entered.set()
        assert may_go.wait(60)
        order.extend("short" if len(piece.job.lengths) == 1 else "long" for piece in pieces)
        return compute(pieces)

    stage.compute = held
    long, short = encoded(stage, *[np.arange(5, 13)] * 20), encoded(stage, np.arange(5, 8))
    assert stage.execute([long]) == [None]
    assert entered.wait(60)
    assert stage.execute([short]) == [None]
    may_go.set()
    assert short.is_sent.wait(60)
    assert long.is_sent.wait(60)
    assert "short" in order[:3], "it runs after the turn in which it came, and at most one more"
    assert order.count("long") == 20


def test_a_turn_that_fails_is_computed_request_by_request(path, caplog):
    stage = start(EncoderStage(), path, dtype="float32", threads="1")
    good, bad, after = (encoded(stage, np.arange(5, 5 + n)) for n in (4, 3, 2))
    compute = stage.compute

    def fragile(pieces):
        if any(3 in piece.job.lengths for piece in pieces):
            raise ZeroDivisionError("secret detail")
        return compute(pieces)

    stage.compute = fragile
    with caplog.at_level(logging.ERROR):
        fine, failed, second = answers(stage, [good, bad, after])
    assert failed.error.message.startswith("internal: the model failed on this request")
    assert "secret" not in failed.error.message
    assert "ZeroDivisionError: secret detail" in caplog.text
    for answer, request in ((fine, good), (second, after)):
        np.testing.assert_allclose(
            answer.value("hidden"), answers(stage, [request])[0].value("hidden"), atol=1e-5
        )


@pytest.mark.parametrize("lengths", [[], [3], [9, -5]])
def test_lengths_that_do_not_fit_the_tokens_are_refused(path, lengths):
    stage = start(EncoderStage(), path, dtype="float32", threads="1")
    wrong = encoded(stage, np.arange(5, 9))
    wrong.inputs["length"] = np.array([lengths], np.int32)
    refused, fine = answers(stage, [wrong, encoded(stage, np.arange(5, 9))])
    assert refused.error.message.startswith("invalid_input: length tells of")
    assert fine.error is None


def test_what_was_taken_in_is_answered_before_the_stage_ends(path):
    stage = start(EncoderStage(), path, dtype="float32", max_batch_tokens="10", threads="1")
    requests = [encoded(stage, *[np.arange(5, 13)] * 5) for _ in range(4)]
    stage.execute(requests)
    stage.finalize()
    assert all(request.is_sent.is_set() for request in requests)
    assert not any(thread.is_alive() for thread in stage._threads)


PAST, FAR = 1_000_000, 2**52


def test_what_is_past_its_deadline_is_not_run(path):
    stage = start(TokenizerStage(), path)
    late, fine = text("a", deadline_ms=PAST), text("b", deadline_ms=FAR)
    for request, answer in zip((late, fine, text("c")), stage.execute([late, fine, text("c")]), strict=True):
        assert (answer.error is not None) == (request is late)
    (only,) = stage.execute([late])
    assert only.error.message.startswith("deadline_exceeded: its deadline passed ")
    assert only.error.code == "CANCELLED"
    (wrong,) = stage.execute([text("a", deadline_ms="soon")])
    assert wrong.error.message == (
        "invalid_input: deadline_ms is 'soon'; it takes a whole number of milliseconds since 1970"
    )


def test_the_encoder_drops_what_is_past_its_deadline_before_its_turn(path):
    stage = start(EncoderStage(), path, dtype="float32", max_batch_tokens="10", threads="1")
    entered, may_go, computed = threading.Event(), threading.Event(), []
    compute = stage.compute

    def held(pieces):
        entered.set()
        assert may_go.wait(60)
        computed.extend(len(piece.job.lengths) for piece in pieces)
        return compute(pieces)

    stage.compute = held
    names = counted(stage)
    first, begun, late = (encoded(stage, *[np.arange(5, 13)] * n) for n in (1, 3, 2))
    refused = encoded(stage, np.arange(5, 13))
    refused.given = {"deadline_ms": PAST}
    assert stage.execute([refused, first]) == [None, None]
    assert refused.sent[0].error.message.startswith("deadline_exceeded")
    assert entered.wait(60)
    stage.execute([begun, late])
    for job in stage.turns:
        if len(job.lengths) == 2:
            # As if it had waited until then.
            job.content.request.deadline_ms = PAST
    may_go.set()
    for request in (first, begun, late):
        assert request.is_sent.wait(60)
    assert late.sent[0].error.message.startswith("deadline_exceeded")
    assert computed == [1, 3, 3, 3], "none of the one with two sequences"
    assert names.count(Count.EXPIRED) == 2


def counted(stage):
    """What the stage counts from now on, one name for each."""
    names = []
    stage.tally.add = lambda count, amount=1: names.extend([count] * amount)
    return names


def without_memory(stage, most, error=torch.OutOfMemoryError):
    """The stage's compute fails as torch does for more than so many tokens; the turns that it computed."""
    compute, turns, freed = stage.compute, [], []

    def limited(pieces):
        tokens = sum(int(piece.job.lengths[piece.places].sum()) for piece in pieces)
        if tokens > most:
            raise error("CUDA out of memory. secret detail")
        turns.append(tokens)
        return compute(pieces)

    stage.compute = limited
    stage.free_memory = lambda: freed.append(True)
    return turns, freed


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_a_device_without_memory_for_a_turn_computes_it_in_halves(path, error):
    stage = start(EncoderStage(), path, dtype="float32", threads="1")
    rows = [np.arange(5, 5 + n) for n in (4, 9, 2, 7, 7, 3)]
    requests = [encoded(stage, *rows[:4]), encoded(stage, rows[4]), encoded(stage, rows[5])]
    expected = [answer.value("hidden") for answer in answers(stage, requests)]
    turns, freed = without_memory(stage, 12, error)
    names = counted(stage)
    got = answers(stage, requests)
    show(f"of at most 12 tokens at a time: turns of {turns}, memory freed {len(freed)} times")
    for one, other in zip(got, expected, strict=True):
        assert one.error is None
        np.testing.assert_allclose(one.value("hidden"), other, atol=1e-5)
    assert max(turns) <= 12
    assert sum(turns) == 32, "nothing is computed twice"
    assert names.count(Count.OUT_OF_MEMORY) == len(freed) > 0


def test_what_fits_in_no_way_is_told_and_its_neighbours_live(path, caplog):
    stage = start(EncoderStage(), path, dtype="float32", max_batch_tokens="20", threads="1")
    small, large, mixed = (
        encoded(stage, np.arange(5, 8)),
        encoded(stage, np.arange(5, 35)),
        encoded(stage, np.arange(5, 8), np.arange(5, 35), np.arange(5, 9)),
    )
    without_memory(stage, 12)
    with caplog.at_level(logging.WARNING):
        fine, refused, half = answers(stage, [small, large, mixed])
    assert fine.error is None
    for answer in (refused, half):
        assert answer.error.code == "UNAVAILABLE"
        assert answer.error.message.startswith("out_of_memory: the device has no memory for 30 tokens at the")
        assert "secret" not in answer.error.message
    assert len(stage.turns) == 0
    after = answers(stage, [small])[0]
    np.testing.assert_allclose(after.value("hidden"), fine.value("hidden"), atol=1e-5)


def test_memory_that_ends_in_a_head_is_told_too(path):
    stage = start(EncoderStage(), path, dtype="float32", threads="1", heads="dense", fuse_heads="true")
    done = []

    def broken(works, answers):
        done.append("finish")
        raise torch.OutOfMemoryError("no")

    stage.free_memory = lambda: done.append("free")
    finish, stage.finish = stage.finish, broken
    (refused,) = answers(stage, [encoded(stage, np.arange(5, 9))])
    assert refused.error.message.startswith("out_of_memory: the device has no memory for 4 tokens")
    assert done == ["finish", "free", "finish"], "once more, when there is room"
    stage.finish = finish
    (fine,) = answers(stage, [encoded(stage, np.arange(5, 9))])
    assert fine.error is None


def test_what_is_loaded_is_not_looked_through_for_garbage(path):
    """As an entry's model.py does it, in a process of its own."""
    gc.disable()
    try:
        start(HeadStage(), path, head="dense", dtype="float32")
        assert gc.isenabled()
        assert gc.get_freeze_count() > 100_000
    finally:
        gc.enable()
        gc.unfreeze()


def test_an_answer_for_which_shared_memory_has_no_room_is_refused_and_the_rest_goes_on(path, monkeypatch):
    stage = start(EncoderStage(), path, dtype="float32", threads="1")
    small, large = encoded(stage, np.arange(5, 8)), encoded(stage, np.arange(5, 35))
    monkeypatch.setattr(response, "is_scarce", lambda needed: True)
    monkeypatch.setattr(InferenceRequest, "room", 8 * 32 * 4)
    fine, refused = answers(stage, [small, large])
    assert fine.error is None
    assert refused.error.code == "UNAVAILABLE"
    assert refused.error.message.startswith(
        "out_of_memory: /dev/shm has no room for 3840 bytes of this model"
    )
    assert "--shm-size" in refused.error.message
    assert stage.ailment is None


@pytest.mark.parametrize("fails", ["computed", "late", "no memory", "alone"])
def test_an_answer_that_cannot_be_sent_costs_no_thread_and_pings_tell(path, fails):
    stage = start(EncoderStage(), path, dtype="float32", threads="1")
    lost, after = (encoded(stage, *[np.arange(5, 9)] * 2) for _ in range(2))
    lost.fails_to_send = True
    compute, entered, may_go = stage.compute, threading.Event(), threading.Event()

    def held(pieces):
        entered.set()
        assert may_go.wait(60)
        if fails == "no memory":
            raise torch.OutOfMemoryError("no")
        if fails == "alone":
            raise ZeroDivisionError("secret detail")
        return compute(pieces)

    stage.compute = held
    if fails == "late":
        stage.execute([encoded(stage, np.arange(5, 9))])
        assert entered.wait(60)
    stage.execute([lost])
    if fails == "late":
        next(iter(stage.turns)).content.request.deadline_ms = PAST
    may_go.set()
    # The turn of the lost one is over when the next request is answered.
    fails = ""
    (fine,) = answers(stage, [after])
    assert fine.error is None
    assert not lost.sent
    assert all(thread.is_alive() for thread in stage._threads)
    assert pong(stage) == "internal: not well: an answer could not be sent, and whoever asked waits in vain"


def test_an_answer_that_the_server_s_module_does_not_take_is_refused(path, monkeypatch):
    stage = start(EncoderStage(), path, dtype="float32", threads="1")
    monkeypatch.setattr(response, "_output", lambda name, value: 1 / 0)
    (refused,) = answers(stage, [encoded(stage, np.arange(5, 9))])
    assert refused.error.message.startswith("internal: the model failed on this request")
    assert stage.ailment is None


def pong(stage):
    """What the encoder says to a ping: an error's message, or None."""
    empty = {"input_ids": np.empty((1, 0), np.int32), "length": np.empty((1, 0), np.int32)}
    (answer,) = answers(stage, [Request(empty, {"ping": True})])
    return answer.error and answer.error.message


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_ping_tells_of_a_thread_that_has_ended(path):
    stage = start(EncoderStage(), path, dtype="float32", threads="1")
    assert pong(stage) is None

    def end(worker, *, is_alone):
        raise SystemExit

    stage.prepare = end
    stage.execute([encoded(stage, np.arange(5, 9))])
    stage._threads[0].join(60)
    assert pong(stage) == "internal: not well: 1 of its 1 threads have ended"


def test_a_ping_tells_of_a_pass_without_end_and_of_none_that_is_only_long(path):
    stage = start(EncoderStage(), path, dtype="float32", threads="1")
    entered, may_go, compute = threading.Event(), threading.Event(), stage.compute

    def held(pieces):
        entered.set()
        assert may_go.wait(60)
        return compute(pieces)

    stage.compute = held
    asked = encoded(stage, np.arange(5, 9))
    stage.execute([asked])
    assert entered.wait(60)
    assert pong(stage) is None
    stage.stuck_after_s = 0.0
    assert re.fullmatch(r"internal: not well: one pass .* for \d+ s, more than 0 s", pong(stage))
    may_go.set()
    assert asked.is_sent.wait(60)
    stage.finalize()
    assert pong(stage) is None


def test_a_ping_tells_of_a_device_that_fails_whatever_it_computes(path):
    """As a GPU does after a fault in a kernel, and not after one of the code."""
    stage = start(EncoderStage(), path, dtype="float32", threads="1")

    def fail(*_):
        raise RuntimeError("device-side assert")

    stage.compute = fail
    (failed,) = answers(stage, [encoded(stage, np.arange(5, 9))])
    assert failed.error.code == "INTERNAL"
    assert pong(stage) is None, "the device itself is well"
    stage.check_device = fail
    answers(stage, [encoded(stage, np.arange(5, 9))])
    assert pong(stage) == "internal: not well: its device fails whatever it computes (RuntimeError)"


@pytest.mark.parametrize("budget", [16, 64])
def test_passes_hold_no_more_tokens_than_the_budget_whatever_is_sent(path, budget):
    """And so the memory of a CPU is bounded; a sequence of more tokens runs alone."""
    stage = start(EncoderStage(), path, dtype="float32", max_batch_tokens=str(budget), threads="2")
    forward, passes = stage.forward, []

    def watched(tokens, *arguments, **options):
        passes.append(int(tokens.lengths.sum()))
        return forward(tokens, *arguments, **options)

    for name in ("is_packed", "shares_prefixes", "device", "padding"):
        setattr(watched, name, getattr(forward, name))
    stage.forward = watched
    generator = np.random.default_rng(5)
    requests = [
        encoded(stage, *[np.arange(5, 5 + n) for n in generator.integers(1, 48, generator.integers(1, 20))])
        for _ in range(40)
    ]
    total = sum(int(request.inputs["length"].sum()) for request in requests)
    assert all(answer.error is None for answer in answers(stage, requests))
    show(f"{total} tokens at once: {len(passes)} passes of at most {max(passes)}, the budget is {budget}")
    assert max(passes) <= max(budget, 47)
    assert sum(passes) == total


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


@pytest.mark.parametrize("most", [3, 1, 0])
def test_a_head_without_memory_for_a_batch_runs_it_in_halves(path, most):
    stage = start(HeadStage(), path, head="dense")
    lengths = np.array([[2, 3]], np.int32)
    requests = [
        Request({"hidden": np.random.default_rng(i).normal(size=(1, 5, 32)).astype("f"), "length": lengths})
        for i in range(5)
    ]
    expected = [answer.value("dense") for answer in stage.execute(requests)]
    head, sizes, freed = stage.head, [], []

    def limited(batch):
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. secret detail")
        sizes.append(len(batch))
        return head(batch)

    limited.inputs = head.inputs
    stage.head, stage.free_memory = limited, lambda: freed.append(True)
    got = stage.execute(requests)
    show(f"of at most {most} requests at a time: batches of {sizes}, memory freed {len(freed)} times")
    assert freed
    for one, other in zip(got, expected, strict=True):
        if most:
            np.testing.assert_allclose(one.value("dense"), other, atol=1e-6)
        else:
            assert one.error.code == "UNAVAILABLE"
            assert one.error.message.startswith("out_of_memory: the device has no memory for this request at")
            assert "secret" not in one.error.message


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


def test_a_ping_is_answered_without_outputs_beside_the_others_of_its_batch(path):
    stage = start(TokenizerStage(), path)
    first, ping, second = answers(stage, [text("a b"), text("", ping=True), text("c")])
    assert first.value("length").tolist() == [[4]]
    assert second.value("length").tolist() == [[3]]
    assert ping.error is None
    assert ping.output_tensors == []
    (alone,) = answers(stage, [text("", ping=True)])
    assert alone.output_tensors == []


def test_the_encoder_answers_a_ping_while_it_computes(path):
    stage = start(EncoderStage(), path, dtype="float32", threads="1")
    may_go_on = threading.Event()
    compute = stage.compute

    def wait_and_compute(pieces):
        assert may_go_on.wait(60)
        return compute(pieces)

    stage.compute = wait_and_compute
    rows = {"input_ids": np.full((1, 3), 5, np.int32), "length": np.array([[3]], np.int32)}
    asked = Request(rows)
    stage.execute([asked])
    empty = {"input_ids": np.empty((1, 0), np.int32), "length": np.empty((1, 0), np.int32)}
    (pong,) = answers(stage, [Request(empty, {"ping": True})])
    assert pong.output_tensors == []
    assert not asked.is_sent.is_set(), "it still computes"
    may_go_on.set()
    assert asked.is_sent.wait(60)
    stage.finalize()
