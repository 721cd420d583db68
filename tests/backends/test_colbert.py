"""ColBERT heads against sentence-transformers; tests/server has BGE-M3's against FlagEmbedding."""

import functools
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from sentence_transformers import MultiVectorEncoder

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError, RequestError
from backends.late_interaction import late_interaction_of
from tests.support import checkpoints
from tests.support.checkpoints import bge_m3, modernbert, pylate, stanford, write_json
from tests.support.pipeline import colbert

TEXTS = ["what is the value", "a class, an object!", "x", "the value of the class; in it", "!?", "x " * 56]


def reference(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MultiVectorEncoder(str(path), device="cpu", local_files_only=True)


def equal(got, expected):
    assert [len(one) for one in got] == [len(one) for one in expected]
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


LAYOUTS = {
    "pylate": pylate,
    "attending": functools.partial(pylate, attend_to_expansion_tokens=True),
    "without expansion": functools.partial(pylate, do_query_expansion=False),
    "without skiplist": functools.partial(pylate, skiplist_words=[]),
    "own prompts": functools.partial(pylate, prompts={"query": "ask ", "document": "tell "}),
    "text prefixes": functools.partial(pylate, query_prefix="[Q] ", document_prefix="[D] "),
    "no prefixes": functools.partial(pylate, query_prefix="", document_prefix=None),
    # A window that holds a whole expanded query, as in the published models.
    "modernbert": functools.partial(pylate, base=functools.partial(modernbert, window=32)),
    # A window that does not: expanded tokens far behind the query look at nothing.
    "narrow window": functools.partial(pylate, base=modernbert),
    # The maker's limit of the transformer is one less than that of documents.
    "long documents": functools.partial(pylate, document_length=60),
    "distilbert": functools.partial(pylate, base=checkpoints.distilbert),
    "padded": functools.partial(pylate, base=checkpoints.mpnet),
    "stanford": stanford,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_sentence_transformers(tmp_path, layout):
    path = LAYOUTS[layout](tmp_path / "c")
    model = reference(path)
    queries, documents = model.encode_query(TEXTS), model.encode_document(TEXTS)
    equal(colbert(path, TEXTS, {"role": "query"}), queries)
    equal(colbert(path, TEXTS, {"role": "document"}), documents)
    equal(colbert(path, TEXTS), documents)
    if layout != "no prefixes":
        assert np.abs(np.asarray(queries[0])[0] - np.asarray(documents[0])[0]).max() > 0.01


def test_two_layouts_in_one_repository(tmp_path):
    """modules.json wins over what config.json says of the original layout."""
    import json

    path = pylate(tmp_path / "c", document_length=9)
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**config, "architectures": ["HF_ColBERT"]})
    write_json(path / "artifact.metadata", {"doc_maxlen": 30})
    assert late_interaction_of(Checkpoint.read(path)).layout == "pylate"
    equal(colbert(path, TEXTS), reference(path).encode_document(TEXTS))


def test_the_layout_that_sentence_transformers_saves(tmp_path):
    """Whatever layout it read, it writes its own; that one must give the same numbers."""
    model = reference(pylate(tmp_path / "old"))
    model.save_pretrained(str(tmp_path / "new"))
    late = late_interaction_of(Checkpoint.read(tmp_path / "new"))
    assert late is not None
    assert late.layout == "sentence_transformers"
    equal(colbert(tmp_path / "new", TEXTS, {"role": "query"}), model.encode_query(TEXTS))
    equal(colbert(tmp_path / "new", TEXTS, {"role": "document"}), model.encode_document(TEXTS))


def test_an_expansion_that_is_only_a_floor(tmp_path):
    model = reference(pylate(tmp_path / "old"))
    model[0].query_expansion = {"strategy": "min", "length": 8, "attend": False}
    model.save_pretrained(str(tmp_path / "new"))
    equal(colbert(tmp_path / "new", TEXTS, {"role": "query"}), model.encode_query(TEXTS))


def test_a_document_of_punctuation_only_keeps_its_special_tokens(tmp_path):
    path = pylate(tmp_path / "c")
    (vectors,) = colbert(path, ["?!"])
    assert len(vectors) == 3, "[CLS], the mark and [SEP]"


def test_the_skiplist_is_for_documents(tmp_path):
    path = pylate(tmp_path / "c", do_query_expansion=False)
    query, document = (colbert(path, ["a, b"], {"role": role})[0] for role in ("query", "document"))
    assert len(query) == len(document) + 1


def test_normalize_false_leaves_lengths_as_they_are(tmp_path):
    path = pylate(tmp_path / "c")
    (unit,), (raw,) = colbert(path, ["a b"]), colbert(path, ["a b"], {"normalize": False})
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.01
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), unit, atol=1e-5)


def test_bge_m3_has_no_vector_for_the_first_token(tmp_path):
    path = bge_m3(tmp_path / "c")
    assert [len(one) for one in colbert(path, ["x", "the"])] == [3, 2]


def test_the_projection_as_safetensors_equals_the_pickle(tmp_path):
    path = bge_m3(tmp_path / "c")
    expected = colbert(path, TEXTS)
    weights = torch.load(path / "colbert_linear.pt")
    (path / "colbert_linear.pt").unlink()
    safetensors.torch.save_file(weights, path / "colbert_linear.safetensors")
    equal(colbert(path, TEXTS), expected)


def test_several_projections(tmp_path):
    path = pylate(tmp_path / "c")
    model = reference(path)
    dense = {
        "in_features": 16,
        "out_features": 8,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    write_json(path / "2_Dense" / "config.json", dense)
    safetensors.torch.save_file(
        {"linear.weight": checkpoints.noise(8, 16, seed=9)}, path / "2_Dense" / "model.safetensors"
    )
    import json

    modules = json.loads((path / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "pylate.models.Dense.Dense"})
    write_json(path / "modules.json", modules)
    got = colbert(path, TEXTS)
    assert got[0].shape[1] == 8
    equal(got, reference(path).encode_document(TEXTS))
    assert len(got[0]) == len(model.encode_document(TEXTS)[0])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("HierarchicalTokenPooling", "holds the module HierarchicalTokenPooling, which is not served"),
        ("Pooling", "holds the module Pooling"),
    ],
)
def test_other_modules_are_refused(tmp_path, kind, message):
    path = pylate(tmp_path / "c")
    import json

    modules = json.loads((path / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_X", "type": f"sentence_transformers.models.{kind}"})
    write_json(path / "modules.json", modules)
    write_json(path / "2_X" / "config.json", {})
    with pytest.raises(CheckpointError, match=message):
        late_interaction_of(Checkpoint.read(path))


def test_a_role_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(RequestError, match="role is 'author'; it takes one of query, document"):
        colbert(pylate(tmp_path / "c"), ["a"], {"role": "author"})


def test_expansion_without_a_mask_token_is_refused(tmp_path):
    path = pylate(tmp_path / "c", base=checkpoints.bert)
    text = (path / "tokenizer.json").read_text().replace("[MASK]", "[XXXX]")
    (path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="queries are expanded, but the tokenizer has no mask token"):
        colbert(path, ["a"], {"role": "query"})
