"""Heads inside the encoder against the same heads in stages of their own."""

import logging

import numpy as np
import pytest
import torch

from backends.checkpoint import Checkpoint
from backends.heads import HEADS
from backends.options import ServingOptions
from backends.repository.pipeline import build_pipeline
from backends.stages.encoder import EncoderStage
from backends.stages.head import HeadStage
from backends.stages.request import StageRequest
from backends.stages.tokens import TokensStage
from tests.backends.test_stages import start
from tests.support import decoders, multimodal
from tests.support.checkpoints import bert, bge_m3, classifier, own_code, pylate, sentence_transformer, splade
from tests.support.fake_pb_utils import Request, answers

LENGTHS = ((4, 9), (2,), (7, 3, 5, 6))


def pipeline_of(path, task, **options):
    given = ServingOptions(task=task, trust_remote_code=True, **options)
    return build_pipeline("tiny", str(path), Checkpoint.read(path), given)


def start_entry(pipeline, name):
    (spec,) = [stage for stage in pipeline.stages if stage.stage == name]
    kinds = {"encoder": EncoderStage, "tokens": TokensStage}
    stage = kinds.get(name, HeadStage)()
    return start(stage, **{"path": spec.parameters["checkpoint"], **spec.parameters}), spec


def request(lengths, parameters=None, seed=0):
    """A request with every input that an encoder or a head may read, and all outputs wanted."""
    total = sum(lengths)
    ids = np.random.default_rng(seed).integers(5, 30, (1, total)).astype(np.int32)
    row = np.array([lengths], np.int32)
    images = {"patches": np.empty((1, 0, 588), np.uint8), "grid": np.empty((1, 0, 3), np.int32)}
    inputs = {"input_ids": ids, "length": row, "key_length": row, "first_length": row, **images}
    inputs["prompt_length"] = np.ones_like(row)
    outputs = {"hidden", "last_hidden"} | {
        "dense",
        "sparse_indices",
        "sparse_weights",
        "sparse_count",
        "token_vectors",
        "vector_count",
        "token_embeddings",
        "token_ids",
        "logits",
    }
    return Request(inputs, parameters or {}, tuple(outputs))


def values(answer):
    assert answer.error is None, answer.error.message
    return {
        tensor.name: np.asarray(torch.as_tensor(tensor.value).float()) for tensor in answer.output_tensors
    }


def unfused(path, task, requests, **options):
    """What the encoder and each head's own stage answer, merged."""
    pipeline = pipeline_of(path, task, **options)
    encoder, _ = start_entry(pipeline, "encoder")
    states = answers(encoder, requests)
    merged = [{} for _ in requests]
    for name in [stage.stage for stage in pipeline.stages[2:]]:
        stage, spec = start_entry(pipeline, name)
        batch = [
            Request(
                {**given.inputs, spec.inputs[0].name: made.output_tensors[0].value}, given.given, given.wanted
            )
            for given, made in zip(requests, states, strict=True)
        ]
        for found, answer in zip(merged, answers(stage, batch), strict=True):
            found |= values(answer)
    return merged


@pytest.mark.parametrize("budget", [16384, 12])
@pytest.mark.parametrize(
    ("make", "task", "names"),
    [
        (bge_m3, "bge_m3", 6),
        (bge_m3, "tokens", 2),
        (splade, "sparse", 3),
        (pylate, "colbert", 2),
        (own_code, "embed", 1),
        (
            lambda path: sentence_transformer(path, {"pooling_mode": "mean", "include_prompt": False}),
            "embed",
            1,
        ),
        (lambda path: classifier(path, bert, 3), "classify", 1),
        (decoders.qwen3_embedding, "embed", 1),
        (decoders.qwen3_reranker, "score", 1),
        (multimodal.gme, "embed", 1),
    ],
)
def test_the_same_answers_as_heads_in_stages_of_their_own(tmp_path, make, task, names, budget):
    path = make(tmp_path / "c")
    options = {"dtype": "float32", "max_batch_tokens": budget, "threads": 2}
    requests = [request(lengths, seed=i) for i, lengths in enumerate(LENGTHS)]
    fused, spec = start_entry(pipeline_of(path, task, fuse_heads=True, **options), "encoder")
    got = [values(answer) for answer in answers(fused, requests)]
    made = {output.name for output in spec.outputs} - {"encoder_times"}
    assert len(made) == names
    for ours, theirs in zip(got, unfused(path, task, requests, **options), strict=True):
        assert made <= set(ours)
        assert not {"hidden", "last_hidden"} & set(ours)
        for name in made:
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6, err_msg=name)
    (other,) = answers(fused, [request(LENGTHS[0], seed=99)])
    found = values(other)
    assert any(not np.array_equal(found[name], got[0][name]) for name in made), "else this shows nothing"


def test_bfloat16_states_are_those_that_would_have_travelled(tmp_path):
    path = bge_m3(tmp_path / "c")
    requests = [request(lengths, seed=i) for i, lengths in enumerate(LENGTHS)]
    fused, _ = start_entry(pipeline_of(path, "bge_m3", fuse_heads=True, dtype="bfloat16"), "encoder")
    got = [values(answer) for answer in answers(fused, requests)]
    for ours, theirs in zip(got, unfused(path, "bge_m3", requests, dtype="bfloat16"), strict=True):
        np.testing.assert_allclose(ours["dense"], theirs["dense"], atol=1e-6)


@pytest.fixture
def bge(tmp_path):
    return start_entry(
        pipeline_of(bge_m3(tmp_path / "c"), "bge_m3", fuse_heads=True, dtype="float32", threads=1), "encoder"
    )[0]


def test_parameters_act_and_requests_that_differ_in_them_do_not_mix(bge):
    plain, short, raw, few = answers(
        bge,
        [
            request((4, 9)),
            request((4, 9), {"dimensions": 8}),
            request((4, 9), {"normalize": False}),
            request((4, 9), {"top_k": 1}),
        ],
    )
    plain, short, raw, few = map(values, (plain, short, raw, few))
    assert short["dense"].shape == (2, 8)
    cut = plain["dense"][:, :8]
    np.testing.assert_allclose(short["dense"], cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)
    norms = np.linalg.norm(raw["dense"], axis=1)
    assert np.abs(norms - 1).min() > 0.05
    assert np.abs(np.linalg.norm(raw["token_vectors"], axis=-1) - 1).max() > 0.05
    np.testing.assert_allclose(raw["dense"] / norms[:, None], plain["dense"], atol=1e-6)
    assert few["sparse_count"].max() == 1
    assert plain["sparse_count"].max() > 1


def test_a_refused_request_is_not_computed_and_its_neighbours_live(bge):
    seen = []
    compute = bge.compute
    bge.compute = lambda pieces: seen.extend(len(piece.job.lengths) for piece in pieces) or compute(pieces)
    before, refused, after = answers(
        bge, [request((4,)), request((5, 5), {"dimensions": 99}), request((3, 2, 1))]
    )
    assert refused.error.message == "invalid_dimensions: dimensions is 99; this model takes 1 to 32"
    assert refused.error.code == "INVALID_ARG"
    assert values(before)["dense"].shape == (1, 32)
    assert values(after)["dense"].shape == (3, 32)
    assert sorted(seen) == [1, 3]


def test_only_heads_that_are_wanted_run(bge):
    ran = []
    for name, head in zip(("dense", "sparse", "colbert"), bge.heads, strict=True):

        def watched(hidden, inputs, parameters, name=name, own=head._head):
            ran.append(name)
            return own(hidden, inputs, parameters)

        watched.check = head._head.check
        head._head = watched
    some = request((4, 9), {"dimensions": 99})
    some.wanted = ("sparse_indices", "sparse_weights", "sparse_count")
    (answer,) = answers(bge, [some])
    assert set(values(answer)) == set(some.wanted), "dimensions are nothing to a head that nobody wants"
    assert ran == ["sparse"]
    answers(bge, [request((4,)), request((5,))])
    assert set(ran) == {"dense", "sparse", "colbert"}


def test_requests_of_one_turn_share_a_pass_of_a_head(bge):
    sizes = []
    apply = bge.heads[0]._apply
    bge.heads[0]._apply = lambda batch: sizes.append(len(batch)) or apply(batch)
    # What one turn gives: a running stage may take the first alone.
    requests = [request((4,)), request((5, 2)), request((3,), {"dimensions": 8}), request((2,))]
    jobs = [bge.admit(StageRequest(one)) for one in requests]
    kept = [{"hidden": torch.randn(1, int(job.lengths.sum()), 32)} for job in jobs]
    found = bge.finish([job.content for job in jobs], kept)
    assert sizes == [3, 1]
    assert [answer["dense"].shape for answer in found] == [(1, 32), (2, 32), (1, 8), (1, 32)]
    sizes.clear()
    bge.max_batch_tokens = 11
    bge.finish([job.content for job in jobs], kept)
    assert sizes == [2, 1, 1], "no more tokens together than in a pass of the encoder"


def test_a_head_that_fails_on_one_request_spares_the_others(bge, caplog):
    head = bge.heads[0]
    own = head._head

    def fragile(hidden, inputs, parameters):
        if 3 in hidden.lengths:
            raise ZeroDivisionError("secret detail")
        return own(hidden, inputs, parameters)

    fragile.check = own.check
    head._head = fragile
    with caplog.at_level(logging.ERROR):
        before, failed, after = answers(bge, [request((4,)), request((3,)), request((5, 2))])
    assert failed.error.message.startswith("internal: the model failed on this request")
    assert "secret" not in failed.error.message
    assert "ZeroDivisionError: secret detail" in caplog.text
    assert values(before)["dense"].shape == (1, 32)
    assert values(after)["dense"].shape == (2, 32)


def test_dimensions_that_only_the_checkpoint_s_own_code_can_refuse(tmp_path):
    path = own_code(tmp_path / "c")
    fused, _ = start_entry(pipeline_of(path, "embed", fuse_heads=True, dtype="float32"), "encoder")
    fine, refused = answers(fused, [request((4,)), request((5,), {"dimensions": 10**6})])
    assert fine.error is None
    assert refused.error.message.startswith(
        "invalid_dimensions: dimensions is 1000000; this model takes 1 to"
    )


def test_the_tokens_head_says_what_its_stage_says(tmp_path):
    path = bge_m3(tmp_path / "c")
    fused, _ = start_entry(pipeline_of(path, "tokens", fuse_heads=True, dtype="float32"), "encoder")
    wrong, unit = answers(fused, [request((4,), {"normalize": 1}), request((4, 2), {"normalize": True})])
    assert wrong.error.message == "invalid_input: normalize is 1; it takes true or false"
    assert values(unit)["token_embeddings"].shape == (1, 6, 32)
    np.testing.assert_allclose(np.linalg.norm(values(unit)["token_embeddings"], axis=-1), 1, atol=1e-6)


def test_every_head_can_be_fused():
    assert all(callable(head.load) for head in HEADS.values())
