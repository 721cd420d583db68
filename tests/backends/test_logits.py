"""Classification heads against sentence-transformers' CrossEncoder, and what is read of labels."""

import functools
import json
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from sentence_transformers import CrossEncoder

from backends.checkpoint import Checkpoint
from backends.classifier import LAYOUTS
from backends.errors import CheckpointError
from backends.heads.logits import HEAD, label_activation, labels, score_activation
from backends.options import ServingOptions
from backends.repository.pipeline import build_pipeline
from tests.support import checkpoints
from tests.support.checkpoints import bert, classifier, sentence_transformer, write_json
from tests.support.pipeline import logits

PAIRS = [
    ("what is the value", "a class of it"),
    ("x", "this is it; for and of to the query return value class object in a of to"),
    ("the value of the class is in the object", "it"),
]
KINDS = {
    "bert": checkpoints.bert,
    # multilingual MiniLM's rerankers: an architecture with token types, a tokenizer without.
    "bert unigram": functools.partial(checkpoints.bert, tokenizer=checkpoints.write_unigram, pad_token_id=1),
    "roberta": checkpoints.roberta,
    "xlm-roberta": checkpoints.xlm_roberta,
    "distilbert": checkpoints.distilbert,
    "electra": checkpoints.electra,
    "albert": checkpoints.albert,
    "modernbert": functools.partial(checkpoints.modernbert, classifier_pooling="cls"),
    "modernbert mean": functools.partial(checkpoints.modernbert, classifier_pooling="mean"),
    "deberta-v2": checkpoints.deberta,
    "mpnet": checkpoints.mpnet,
    "gte": checkpoints.gte,
    "nomic_bert": checkpoints.nomic_bert,
    "jina_embeddings_v3": checkpoints.jina_v3,
    "eurobert": functools.partial(checkpoints.eurobert, classifier_pooling="late"),
    "eurobert mean": functools.partial(checkpoints.eurobert, classifier_pooling="mean"),
    "eurobert bos": functools.partial(checkpoints.eurobert, classifier_pooling="bos"),
}


def expected(path, items, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = CrossEncoder(
            str(path), device="cpu", local_files_only=True, activation_fn=torch.nn.Identity(), **options
        )
        return np.atleast_2d(encoder.predict(items)).reshape(len(items), -1)


def change(path, **entries):
    config = {**json.loads((path / "config.json").read_text()), **entries}
    write_json(path / "config.json", {name: value for name, value in config.items() if value is not None})
    return Checkpoint.read(path)


@pytest.mark.parametrize("n_labels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_equal_the_cross_encoder(tmp_path, kind, n_labels):
    path = classifier(tmp_path / "c", KINDS[kind], n_labels)
    got, want = logits(path, PAIRS), expected(path, PAIRS)
    np.testing.assert_allclose(got, want, atol=1e-5)
    alone = np.concatenate([logits(path, [pair]) for pair in PAIRS])
    np.testing.assert_allclose(got, alone, atol=1e-5)
    np.testing.assert_allclose(logits(path, PAIRS, max_batch_tokens=1), alone, atol=1e-5)
    assert np.abs(np.roll(got, 1, axis=0) - want).max() > 1e-2, "other pairs must differ"


def test_every_layout_is_tested():
    tested = {kind.split()[0] for kind in KINDS}
    # The same layout under the names of relatives.
    assert set(LAYOUTS) - tested == {"camembert", "xlm-roberta-xl", "deberta", "new"}


def test_token_types_matter(tmp_path):
    path = classifier(tmp_path / "c", checkpoints.bert)
    got = logits(path, PAIRS)
    file = path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    types = weights["bert.embeddings.token_type_embeddings.weight"]
    types[1] = types[0]
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    assert np.abs(logits(path, PAIRS) - got).max() > 1e-2
    np.testing.assert_allclose(logits(path, PAIRS), expected(path, PAIRS), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_longest_first_truncation(tmp_path, kind):
    path = classifier(tmp_path / "c", functools.partial(KINDS[kind], max_length=24))
    words = ["the", "value", "of", "this", "class", "object", "query", "it", "in", "a", "return"]
    pairs = [
        (" ".join(words[:a] * 3), " ".join(words[:b] * 3)) for a in range(1, 12, 2) for b in range(1, 12, 3)
    ]
    np.testing.assert_allclose(logits(path, pairs), expected(path, pairs), atol=1e-5)


def test_single_texts(tmp_path):
    from transformers import pipeline

    path = classifier(tmp_path / "c", checkpoints.distilbert, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = pipeline("text-classification", model=str(path), device="cpu")(
            [a for a, _ in PAIRS], top_k=None, function_to_apply="none"
        )
    want = [[row["score"] for row in sorted(one, key=lambda row: row["label"])] for one in rows]
    np.testing.assert_allclose(logits(path, [a for a, _ in PAIRS]), want, atol=1e-5)


@pytest.mark.parametrize(
    ("entries", "names", "score", "label"),
    [
        ({"id2label": {"0": "LABEL_0"}}, ["LABEL_0"], "sigmoid", "sigmoid"),
        ({"id2label": None, "num_labels": 1}, ["LABEL_0"], "sigmoid", "sigmoid"),
        ({"id2label": {"0": "no", "1": "yes"}}, ["no", "yes"], "identity", "softmax"),
        ({"id2label": None}, ["LABEL_0", "LABEL_1"], "identity", "softmax"),
        (
            {"id2label": {"0": "a", "1": "b"}, "problem_type": "multi_label_classification"},
            ["a", "b"],
            "identity",
            "sigmoid",
        ),
        ({"id2label": {"0": "s"}, "problem_type": "regression"}, ["s"], "sigmoid", "identity"),
        (
            {
                "id2label": {"0": "s"},
                "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
            },
            ["s"],
            "identity",
            "sigmoid",
        ),
        (
            {
                "id2label": {"0": "s"},
                "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
            },
            ["s"],
            "identity",
            "sigmoid",
        ),
    ],
)
def test_what_is_read_of_labels_and_activations(tmp_path, entries, names, score, label):
    checkpoint = change(bert(tmp_path / "c", architecture="ForSequenceClassification"), **entries)
    assert labels(checkpoint) == names
    assert score_activation(checkpoint) == score
    assert label_activation(checkpoint) == label


def test_an_unknown_activation_is_refused(tmp_path):
    path = classifier(tmp_path / "c", checkpoints.bert)
    checkpoint = change(path, sbert_ce_default_activation_function="mine.Cubed")
    with pytest.raises(
        CheckpointError, match=r"the activation 'mine\.Cubed' is not served; known are Identity"
    ):
        score_activation(checkpoint)


def test_labels_that_do_not_fit_the_weights_are_refused(tmp_path):
    path = classifier(tmp_path / "c", checkpoints.bert, 5)
    change(path, id2label=None, label2id=None)
    with pytest.raises(
        CheckpointError, match=r"has 5 labels, but config\.json tells of 2 \(two where it has neither"
    ):
        logits(path, PAIRS)


def build(path, **options):
    return build_pipeline("c", str(path), Checkpoint.read(path), ServingOptions(**options))


def test_what_a_checkpoint_is_served_as(tmp_path):
    reranker = classifier(tmp_path / "reranker", checkpoints.bert)
    several = classifier(tmp_path / "several", checkpoints.bert, 3, ("a", "b", "c"))
    pipeline = build(reranker)
    assert pipeline.parameters["tasks"] == "score,classify"
    assert pipeline.reasons == {
        "logits": "config.json says BertForSequenceClassification, with one label: a reranker"
    }
    assert build(several).parameters["tasks"] == "classify"
    assert json.loads(build(several).parameters["labels"]) == ["a", "b", "c"]
    assert [spec.name for spec in pipeline.stages[1].inputs] == ["input_ids", "length", "first_length"]
    for word in ("RERANKER", "classifier", "SEQ_CLASSIFICATION"):
        assert build(reranker, task=word).parameters["tasks"] == "score,classify"
    assert build(several, task="CLASSIFIER").parameters["tasks"] == "classify"
    with pytest.raises(CheckpointError, match=r"has 3 labels \(a, b, c\); a reranker has one"):
        build(several, task="RERANKER")
    assert build(reranker, task="embed").parameters["tasks"] == "embed", "its encoder, all the same"


def test_other_cross_encoders_are_refused(tmp_path):
    path = sentence_transformer(
        tmp_path / "c", {"pooling_mode": "mean"}, sentence={"model_type": "CrossEncoder"}
    )
    change(path, architectures=["BertForSequenceClassification"])
    with pytest.raises(CheckpointError, match="holds the module Pooling, which is not served in a reranker"):
        HEAD.outputs(Checkpoint.read(path))


def test_other_positions_are_refused(tmp_path):
    path = classifier(tmp_path / "c", checkpoints.bert)
    change(path, position_embedding_type="alibi")
    with pytest.raises(CheckpointError, match="position_embedding_type 'alibi', which is not served"):
        build(path)


def test_labels_as_a_list(tmp_path):
    path = classifier(tmp_path / "c", checkpoints.bert, 2)
    assert labels(change(path, id2label=["a", "b"])) == ["a", "b"]
    with pytest.raises(CheckpointError, match="id2label is no object of names by number"):
        labels(change(path, id2label="a"))
