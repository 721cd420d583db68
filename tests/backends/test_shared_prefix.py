"""What sequences begin with is computed once, and nothing else changes."""

import logging

import numpy as np
import pytest
import torch

from backends.checkpoint import Checkpoint
from backends.encode import encode
from backends.families import FAMILIES, family_of
from backends.forward import PackedForward
from backends.ragged import Ragged
from backends.self_check import choose_forward
from backends.shared_prefix import MIN_SHARED, count_distinct, plan
from tests.support import checkpoints, decoders, families
from tests.support.pipeline import CPU

DECODERS = sorted(name for name, family in FAMILIES.items() if family.is_decoder)


def rng(seed=0):
    return np.random.default_rng(seed)


def sequence(length, seed):
    return rng(seed).integers(5, 300, length)


PREFIX, OTHER = sequence(40, 1), sequence(25, 2)
DEEP = np.concatenate([PREFIX, sequence(20, 3)])
BATCHES = {
    "a prompt and texts": [np.concatenate([PREFIX, sequence(n, 10 + n)]) for n in (5, 9, 9, 1, 30)],
    "two prompts": [
        np.concatenate([head, sequence(n, 10 + n)]) for n in (5, 9, 3) for head in (PREFIX, OTHER)
    ],
    "a prompt in a prompt": [
        np.concatenate([head, sequence(n, 30 + n)]) for n in (4, 7) for head in (PREFIX, DEEP)
    ],
    "the same text": [DEEP, DEEP, sequence(8, 9), DEEP],
    "one goes on from the other": [PREFIX, DEEP, PREFIX[:-1]],
    "nothing in common": [sequence(n, n) for n in (5, 11, 3)],
    "too little in common": [np.concatenate([PREFIX[:9], sequence(n, n)]) for n in (5, 11, 3)],
    "one": [PREFIX],
    "short ones": [sequence(2, 1), sequence(2, 1), sequence(1, 4)],
}


def ragged(rows):
    return Ragged.pack([torch.from_numpy(row) for row in rows])


def passes(rows, max_tokens=10_000, min_shared=MIN_SHARED):
    batch = ragged(rows)
    return list(plan(batch.values.numpy(), batch.lengths, max_tokens, min_shared))


@pytest.mark.parametrize("name", BATCHES)
def test_about_as_many_distinct_tokens_are_counted_as_a_pass_has(name):
    batch = ragged(BATCHES[name])
    computed = sum(int(one.lengths.sum()) for one in passes(BATCHES[name]))
    # A few common tokens are not worth a segment of their own.
    assert 0.9 * computed < count_distinct(batch.values.numpy(), batch.lengths) <= computed


def rebuilt(one, ids):
    """Of every segment the ids of the whole sequence up to its end, put together from its prefixes."""
    ends = np.cumsum(one.lengths)
    for length, end, start, prefix in zip(one.lengths, ends, one.starts, one.prefixes, strict=True):
        row = ids[one.row]
        ahead = [row[a:b] for a, b in prefix]
        assert start == sum(map(len, ahead))
        yield np.concatenate([*ahead, row[end - length : end]])


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("max_tokens", [10_000, 70, 1])
@pytest.mark.parametrize("min_shared", [MIN_SHARED, 1, 3])
def test_every_token_is_made_once_with_all_that_is_before_it(name, max_tokens, min_shared):
    rows = BATCHES[name]
    ids = np.concatenate(rows)
    found = passes(rows, max_tokens, min_shared)
    made = np.concatenate([one.tokens for one in found])
    assert sorted(made) == list(range(len(ids)))
    before = {}
    offset = 0
    for row in rows:
        before.update({offset + i: row[: i + 1] for i in range(len(row))})
        offset += len(row)
    for one in found:
        whole = list(rebuilt(one, ids))
        ends = np.cumsum(one.lengths)
        for token, source in zip(one.tokens, one.sources, strict=True):
            segment = int(np.searchsorted(ends, source, side="right"))
            behind = int(ends[segment] - source) - 1
            history = whole[segment][: len(whole[segment]) - behind]
            assert history.tolist() == before[int(token)].tolist()


@pytest.mark.parametrize(
    ("name", "computed"),
    [
        ("a prompt and texts", 40 + 5 + 9 + 9 + 1 + 30),
        ("two prompts", 40 + 25 + 2 * (5 + 9 + 3)),
        ("a prompt in a prompt", 40 + 20 + 2 * (4 + 7)),
        ("the same text", 60 + 8),
        ("one goes on from the other", 39 + 1 + 20 + 1),
        ("nothing in common", 19),
        ("too little in common", 3 * 9 + 19),
        ("one", 40),
    ],
)
def test_how_many_tokens_are_computed(name, computed):
    found = passes(BATCHES[name])
    assert sum(len(one.row) for one in found) in (computed, computed - 1)
    assert len(found) == 1


def test_shared_tokens_count_once_against_the_budget():
    rows = [np.concatenate([PREFIX, sequence(10, 10 + i)]) for i in range(20)]
    (one,) = passes(rows, 260)
    assert len(one.row) == 240
    several = passes(rows, 100)
    assert all(len(one.row) <= 100 for one in several)
    assert len(several) < 6, "each begins with the prefix"


def test_texts_that_go_on_from_each_other_do_not_make_a_deep_tree():
    long = sequence(3000, 5)
    (one,) = passes([long[: 20 * i] for i in range(1, 100)], 10**6)
    assert max(map(len, one.prefixes)) <= 8


def test_one_batch_holds_a_thousand_sequences():
    rows = [np.concatenate([PREFIX, sequence(4, i)]) for i in range(1000)]
    (one,) = passes(rows, 10**6)
    assert len(one.row) == 40 + sum(len(row) for row in np.unique([row[40:] for row in rows], axis=0))


def load(name, path, **options):
    checkpoint = Checkpoint.read(families.FAMILIES[name](path))
    family = family_of(checkpoint)
    return choose_forward(
        lambda attention: family.load(checkpoint, attention, torch.float32, CPU),
        family,
        dict(checkpoint.config),
        "test",
        **options,
    )


def run(forward, rows, max_tokens=10_000, wanted=None):
    with torch.inference_mode():
        return encode(forward, ragged(rows), max_tokens, torch.float32, rows=wanted)


@pytest.fixture(scope="module", params=DECODERS)
def forwards(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("c") / request.param
    return load(request.param, path), load(request.param, path, shares_prefixes=True)


@pytest.mark.parametrize("name", BATCHES)
def test_sharing_changes_nothing(forwards, name):
    plain, shared = forwards
    assert shared.shares_prefixes
    assert not plain.shares_prefixes
    rows = BATCHES[name]
    expected = run(plain, rows)
    torch.testing.assert_close(run(shared, rows), expected, atol=1e-5, rtol=1e-5)
    for budget in (1, 33, 70):
        torch.testing.assert_close(run(shared, rows, budget), expected, atol=1e-5, rtol=1e-5)


def test_only_the_rows_that_are_wanted(forwards):
    for forward in forwards:
        rows = BATCHES["two prompts"]
        last = np.cumsum([len(row) for row in rows]) - 1
        for budget in (10_000, 33):
            got = run(forward, rows, budget, last)
            torch.testing.assert_close(got, run(forward, rows)[torch.from_numpy(last)])


def test_negative_control_the_wrong_positions_show(forwards, monkeypatch):
    plain, shared = forwards
    rows = BATCHES["a prompt and texts"]
    expected = run(plain, rows)
    original = PackedForward.__call__

    def shifted(self, input_ids, keys=None, firsts=None, segments=None, images=None):
        if segments is not None:
            segments = type(segments)(segments.starts * 0, segments.prefixes)
        return original(self, input_ids, keys, firsts, segments, images)

    monkeypatch.setattr(PackedForward, "__call__", shifted)
    assert (run(shared, rows) - expected).abs().max() > 0.01


def test_a_model_that_sharing_would_change_runs_without(tmp_path, caplog):
    """Its embeddings know how long their sequence is."""
    checkpoint = Checkpoint.read(checkpoints.qwen3(tmp_path / "c"))
    family = family_of(checkpoint)

    def load_changed(attention):
        model = family.load(checkpoint, attention, torch.float32, CPU)

        def scale(module, arguments, keywords):
            lengths = torch.tensor(keywords["sequence_lengths"])
            sizes = torch.repeat_interleave(lengths, lengths)
            embedded = model.embed_tokens(keywords.pop("input_ids"))
            embedded[0, : len(sizes)] += sizes[:, None] / 10
            keywords["inputs_embeds"] = embedded
            return arguments, keywords

        model.register_forward_pre_hook(scale, with_kwargs=True)
        return model

    with caplog.at_level(logging.WARNING):
        forward = choose_forward(load_changed, family, dict(checkpoint.config), "odd", shares_prefixes=True)
    assert forward.is_packed
    assert not forward.shares_prefixes
    assert "odd gives other numbers behind a shared prefix" in caplog.text


def test_bidirectional_models_share_nothing(tmp_path):
    from backends.stages.encoder import EncoderStage
    from tests.backends.test_stages import start

    gte = start(EncoderStage(), decoders.gte_qwen2(tmp_path / "gte"), dtype="float32")
    assert not gte.forward.shares_prefixes
    qwen = decoders.qwen3_embedding(tmp_path / "qwen")
    assert start(EncoderStage(), qwen, dtype="float32").forward.shares_prefixes
    assert not start(EncoderStage(), qwen, dtype="float32", share_prefix="false").forward.shares_prefixes
