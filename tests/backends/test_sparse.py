"""Sparse heads against sentence-transformers; tests/server has BGE-M3's against FlagEmbedding."""

import functools
import json
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from sentence_transformers import SparseEncoder

from backends.checkpoint import Checkpoint
from backends.contract import SPARSE_INDICES, SPARSE_WEIGHTS
from backends.errors import CheckpointError, RequestError
from backends.heads import HEADS, sparse
from backends.ragged import Ragged
from tests.support import checkpoints
from tests.support.checkpoints import bge_m3, splade, write_json
from tests.support.pipeline import run
from tests.support.pipeline import sparse as make

TEXTS = ["what is the value", "a class, an object!", "x", "this is it; for and of to the query return value"]


def with_head(kind):
    return functools.partial(getattr(checkpoints, kind), architecture="ForMaskedLM")


def reference(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SparseEncoder(str(path), device="cpu", local_files_only=True)
        return model.encode(TEXTS, **options).to_dense().numpy()


def dense(rows, size):
    made = np.zeros((len(rows), size), np.float32)
    for i, row in enumerate(rows):
        made[i, list(row)] = list(row.values())
    return made


# Every architecture whose masked-language-model head is served.
@pytest.mark.parametrize(
    "kind", ["bert", "distilbert", "xlm_roberta", "modernbert", "electra", "albert", "mpnet", "gte"]
)
def test_splade_equals_sentence_transformers(tmp_path, kind):
    path = splade(tmp_path / kind, base=with_head(kind))
    expected = reference(path)
    got = dense(make(path, TEXTS), expected.shape[1])
    assert ((got > 0) == (expected > 0)).all()
    assert (expected > 0).sum(1).min() > 10
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.abs(np.roll(got, 1, axis=0) - expected).max() > 0.1, "other texts must differ"


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_pooling_and_activation(tmp_path, pooling, activation):
    settings = {"pooling_strategy": pooling, "activation_function": activation}
    path = splade(tmp_path / "c", pooling=settings)
    expected = reference(path)
    np.testing.assert_allclose(dense(make(path, TEXTS), expected.shape[1]), expected, atol=1e-5)
    other = splade(
        tmp_path / "d", pooling={**settings, "pooling_strategy": "max" if pooling == "sum" else "sum"}
    )
    assert np.abs(dense(make(other, TEXTS), expected.shape[1]) - expected).max() > 0.1


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_long_texts_run_in_chunks(tmp_path, monkeypatch, pooling):
    path = splade(tmp_path / "c", pooling={"pooling_strategy": pooling})
    whole = make(path, TEXTS)
    monkeypatch.setattr(sparse, "_CHUNK", 3)
    for one, other in zip(whole, make(path, TEXTS), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_top_k_equals_max_active_dims(tmp_path):
    path = splade(tmp_path / "c")
    expected = reference(path, max_active_dims=7)
    got = make(path, TEXTS, {"top_k": 7})
    assert [len(row) for row in got] == [7] * 4
    np.testing.assert_allclose(dense(got, expected.shape[1]), expected, atol=1e-5)
    assert make(path, TEXTS, {"top_k": 100_000}) == make(path, TEXTS)


def test_a_checkpoint_s_own_max_active_dims(tmp_path):
    path = splade(tmp_path / "c")
    write_json(
        path / "config_sentence_transformers.json", {"model_type": "SparseEncoder", "max_active_dims": 5}
    )
    assert [len(row) for row in make(path, TEXTS)] == [5] * 4
    assert [len(row) for row in make(path, TEXTS, {"top_k": 9})] == [9] * 4


@pytest.mark.parametrize("bad", [0, -1, True, "3", 1.5])
def test_a_bad_top_k_is_refused(tmp_path, bad):
    with pytest.raises(RequestError, match="it takes a whole number of at least 1"):
        make(splade(tmp_path / "c"), TEXTS[:1], {"top_k": bad})


def test_an_untied_decoder_wins_over_the_word_embeddings(tmp_path):
    path = splade(tmp_path / "c")
    before = make(path, TEXTS)
    file = path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    assert "vocab_projector.weight" not in weights, "it is tied in this checkpoint"
    words = weights["distilbert.embeddings.word_embeddings.weight"]
    weights["vocab_projector.weight"] = words.flip(0).contiguous()
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    after = make(path, TEXTS)
    assert after != before
    size = words.shape[0]
    # Without their biases, ids are mirrored; with them the largest stay close.
    assert {size - 1 - i for i in after[0]} & set(before[0])


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    path = splade(tmp_path / "c")
    file = path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    kept = {name: value for name, value in weights.items() if name != "vocab_transform.weight"}
    safetensors.torch.save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks vocab_transform\.weight"):
        make(path, TEXTS)
    bare = splade(tmp_path / "d", base=checkpoints.bert)
    with pytest.raises(CheckpointError, match=r"has no sparse head: no sparse_linear\.pt, and the BertModel"):
        HEADS["sparse"].outputs(Checkpoint.read(bare))


@pytest.mark.parametrize(("name", "value"), [("pooling_strategy", "median"), ("activation_function", "gelu")])
def test_unknown_pooling_is_refused(tmp_path, name, value):
    path = splade(tmp_path / "c", pooling={name: value})
    with pytest.raises(CheckpointError, match=f"{name} '{value}' of its SpladePooling is not served"):
        HEADS["sparse"].outputs(Checkpoint.read(path))


def test_bge_m3_leaves_special_and_negative_tokens_out(tmp_path):
    path = bge_m3(tmp_path / "c")
    torch.save({"weight": torch.zeros(1, 32), "bias": torch.tensor([0.5])}, path / "sparse_linear.pt")
    (row,) = make(path, ["the the é <mask>"])
    vocabulary = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    names = [vocabulary[i][0] for i in row]
    assert set(row.values()) == {0.5}
    assert "▁the" in names
    assert not {"<s>", "</s>", "<pad>", "<unk>"} & set(names), "é is unknown to this vocabulary"
    assert "<mask>" in names
    torch.save({"weight": torch.zeros(1, 32), "bias": torch.tensor([-0.5])}, path / "sparse_linear.pt")
    assert make(path, TEXTS) == [{}] * 4


def test_equal_tokens_keep_their_largest_weight(tmp_path):
    path = bge_m3(tmp_path / "c")
    answer = run(path, "sparse", ["the value of the value of the"])
    indices = answer[SPARSE_INDICES].values.tolist()
    assert len(indices) == len(set(indices))
    assert indices == sorted(indices)


def test_the_head_as_safetensors_equals_the_pickle(tmp_path):
    path = bge_m3(tmp_path / "c")
    expected = make(path, TEXTS)
    weights = torch.load(path / "sparse_linear.pt")
    (path / "sparse_linear.pt").unlink()
    safetensors.torch.save_file(weights, path / "sparse_linear.safetensors")
    assert make(path, TEXTS) == expected


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    path = bge_m3(tmp_path / "c")
    torch.save({"weight": Evil()}, path / "sparse_linear.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        make(path, TEXTS)
    assert not (tmp_path / "owned").exists()


def test_the_largest_weights_of_each_segment():
    segments = torch.tensor([0, 0, 0, 2, 2])
    indices = torch.tensor([1, 5, 9, 3, 4])
    weights = torch.tensor([0.5, 0.9, 0.5, 0.1, 0.2])
    kept = sparse._largest((segments, indices, weights), 2)
    assert [x.tolist() for x in kept[:2]] == [[0, 0, 2, 2], [1, 5, 3, 4]]


def test_texts_without_any_weight_in_between():
    head = sparse.SparseHead(
        lambda hidden, inputs: (torch.tensor([1]), torch.tensor([7]), torch.tensor([0.5])), None
    )
    hidden = Ragged(torch.zeros(4, 2), np.array([1, 2, 1]))
    answer = head(hidden, {}, {"top_k": 3})
    assert answer[SPARSE_WEIGHTS].lengths.tolist() == [0, 1, 0]


def test_a_pickle_of_an_old_torch(tmp_path):
    path = bge_m3(tmp_path / "c")
    expected = make(path, TEXTS)
    weights = torch.load(path / "sparse_linear.pt")
    torch.save(weights, path / "sparse_linear.pt", _use_new_zipfile_serialization=False)
    assert make(path, TEXTS) == expected


def test_other_sparse_modules_are_refused(tmp_path):
    path = splade(tmp_path / "c")
    kinds = [
        "sentence_transformers.models.Transformer",
        "sentence_transformers.sparse_encoder.models.SparseAutoEncoder",
    ]
    write_json(
        path / "modules.json",
        [
            {"idx": i, "name": str(i), "path": "" if i == 0 else str(i), "type": t}
            for i, t in enumerate(kinds)
        ],
    )
    with pytest.raises(CheckpointError, match="SparseAutoEncoder in a sparse model is not served"):
        HEADS["sparse"].outputs(Checkpoint.read(path))
