"""The dense head against sentence-transformers, in float32."""

import json
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from sentence_transformers import SentenceTransformer

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError, RequestError
from backends.heads import HEADS
from backends.heads.dense import dimensions, pooling_modes
from backends.ragged import Ragged
from backends.sentence_modules import Pooling
from tests.support.checkpoints import bert, sentence_transformer, write_json
from tests.support.pipeline import embed
from tests.support.sentences import sentences

TEXTS = ["a", *(text[:200] for text in sentences(40))]
NORMALIZE = [("Normalize", {})]
TANH = "torch.nn.modules.activation.Tanh"
IDENTITY = "torch.nn.modules.linear.Identity"


def dense(size_in, size_out, **config):
    return (
        "Dense",
        {
            "in_features": size_in,
            "out_features": size_out,
            "bias": True,
            "activation_function": TANH,
            **config,
        },
    )


FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
CHAINS = {
    **{f"flag {mode}": ({flag: True}, NORMALIZE) for mode, flag in FLAGS.items()},
    **{f"mode {mode}": ({"pooling_mode": mode}, []) for mode in FLAGS},
    "no mode at all": ({}, []),
    "all flags": (dict.fromkeys(FLAGS.values(), True), NORMALIZE),
    "modes in an order of their own": ({"pooling_mode": ["lasttoken", "mean", "cls"]}, []),
    "dense": ({"pooling_mode_mean_tokens": True}, [dense(32, 24), *NORMALIZE]),
    "dense without bias": (
        {"pooling_mode_cls_token": True},
        [
            dense(32, 48, bias=False, activation_function=IDENTITY),
            dense(48, 16, activation_function=IDENTITY),
        ],
    ),
    "residual": (
        {"pooling_mode": "mean"},
        [dense(32, 32, use_residual=True), dense(32, 8, use_residual=True)],
    ),
    "layer norm": ({"pooling_mode": "mean"}, [("LayerNorm", {"dimension": 32}), *NORMALIZE]),
    "normalize in the middle": ({"pooling_mode": "mean"}, [*NORMALIZE, dense(32, 8)]),
    "dropout": ({"pooling_mode": "mean"}, [("Dropout", {"dropout": 0.5}), *NORMALIZE]),
}


def reference(path, texts=TEXTS, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about its own older layouts
        model = SentenceTransformer(str(path), device="cpu", local_files_only=True)
        return model.encode(list(texts), **arguments)


@pytest.mark.parametrize("name", CHAINS)
def test_equals_sentence_transformers(tmp_path, name):
    pooling, links = CHAINS[name]
    path = sentence_transformer(tmp_path / "c", pooling, links)
    if name == "dropout":
        write_json(path / "2_Dropout" / "config.json", {"dropout": 0.5})
    expected = reference(path)
    got = embed(path, TEXTS)
    assert got.shape == expected.shape
    assert got.shape[1] == dimensions(Checkpoint.read(path))
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def test_negative_control_every_mode_gives_other_vectors(tmp_path):
    vectors = [
        embed(sentence_transformer(tmp_path / mode, {"pooling_mode": mode}, []), ["some value to return"])
        for mode in FLAGS
    ]
    for i, one in enumerate(vectors):
        for other in vectors[i + 1 :]:
            assert np.abs(one - other).max() > 0.01


def test_without_modules_json(tmp_path):
    path = bert(tmp_path / "c")
    np.testing.assert_allclose(embed(path, TEXTS), reference(path), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", FLAGS)
@pytest.mark.parametrize("prompt", ["query", "long"])
def test_prompts_can_be_left_out_of_the_pooling(tmp_path, mode, prompt):
    # The long one leaves room for one token of the text.
    prompts = {"query": "query: ", "long": "x " * 45}
    pooling = {"pooling_mode": mode, "include_prompt": False}
    path = sentence_transformer(tmp_path / "c", pooling, sentence={"prompts": prompts})
    texts = ["value", "what is the value of this class?", "a b c"]
    got = embed(path, texts, {"prompt_name": prompt})
    np.testing.assert_allclose(got, reference(path, texts, prompt_name=prompt), atol=1e-5, rtol=1e-5)
    if mode != "lasttoken":
        config = path / "1_Pooling" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "include_prompt": True}))
        assert np.abs(embed(path, texts, {"prompt_name": prompt}) - got).max() > 0.01


def test_dimensions_cut_and_give_unit_length(tmp_path):
    path = sentence_transformer(tmp_path / "c", {"pooling_mode": "mean"})
    whole, cut = embed(path, TEXTS), embed(path, TEXTS, {"dimensions": 8})
    assert cut.shape == (len(TEXTS), 8)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(
        cut, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-5
    )
    np.testing.assert_allclose(
        cut, reference(path, truncate_dim=8, normalize_embeddings=True), atol=1e-5, rtol=1e-5
    )
    bare = sentence_transformer(tmp_path / "bare", {"pooling_mode": "mean"}, [])
    np.testing.assert_allclose(embed(bare, TEXTS, {"dimensions": 8}), cut, atol=1e-6)
    whole = {"dimensions": 32, "normalize": False}
    np.testing.assert_allclose(embed(bare, TEXTS, whole), embed(bare, TEXTS), atol=1e-6)


def test_a_checkpoint_may_cut_its_embeddings_itself(tmp_path):
    path = sentence_transformer(tmp_path / "c", {"pooling_mode": "mean"}, sentence={"truncate_dim": 8})
    expected = reference(path)
    got = embed(path, TEXTS)
    assert got.shape == expected.shape == (len(TEXTS), 8)
    # sentence-transformers leaves the cut vectors short; here they have unit length again.
    np.testing.assert_allclose(got, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    with pytest.raises(RequestError, match="takes 1 to 8"):
        embed(path, TEXTS, {"dimensions": 9})


def test_normalize_can_be_asked_for_and_declined(tmp_path):
    path = sentence_transformer(tmp_path / "c", {"pooling_mode": "mean"})
    bare = sentence_transformer(tmp_path / "bare", {"pooling_mode": "mean"}, [])
    np.testing.assert_allclose(embed(path, TEXTS, {"normalize": False}), embed(bare, TEXTS), atol=1e-6)
    np.testing.assert_allclose(embed(bare, TEXTS, {"normalize": True}), embed(path, TEXTS), atol=1e-6)
    assert np.linalg.norm(embed(bare, TEXTS), axis=1).max() > 1.5, (
        "the bare chain must not be normalised already"
    )


@pytest.mark.parametrize(
    "bad",
    [{"dimensions": 0}, {"dimensions": 33}, {"dimensions": "8"}, {"dimensions": True}, {"normalize": "yes"}],
)
def test_parameters_that_cannot_be_met_are_refused(tmp_path, bad):
    path = sentence_transformer(tmp_path / "c", {"pooling_mode": "mean"})
    head = HEADS["dense"].load(Checkpoint.read(path), torch.device("cpu"), torch.float32)
    with pytest.raises(RequestError, match=r"is .*; .*takes"):
        head.check(bad)


@pytest.mark.parametrize(
    ("pooling", "links", "message"),
    [
        ({"pooling_mode": "median"}, [], "pooling mode 'median' is not served"),
        ({"pooling_mode": "mean"}, [("WeightedLayerPooling", {})], "holds the module WeightedLayerPooling"),
        (
            {"pooling_mode": "mean"},
            [dense(99, 8)],
            "says in_features 99; 32 features come in",
        ),
        (
            {"pooling_mode": "mean"},
            [dense(32, 8, module_input_name="token_embeddings")],
            "module_input_name is",
        ),
    ],
)
def test_chains_that_are_not_served_say_why(tmp_path, pooling, links, message):
    path = sentence_transformer(tmp_path / "c", pooling, links)
    with pytest.raises(CheckpointError, match=message):
        dimensions(Checkpoint.read(path))


def test_a_normalize_of_tokens_is_refused(tmp_path):
    path = sentence_transformer(tmp_path / "c", {"pooling_mode": "mean"})
    write_json(path / "2_Normalize" / "config.json", {"module_input_name": "token_embeddings"})
    with pytest.raises(CheckpointError, match="module_input_name is 'token_embeddings'"):
        dimensions(Checkpoint.read(path))


@pytest.mark.parametrize("mode", FLAGS)
def test_pooling_of_half_precision_is_in_float32(mode):
    values = torch.randn(600, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16) + 5
    got = Pooling([mode])(Ragged(values, np.array([600])))
    assert got.dtype is torch.float32
    torch.testing.assert_close(
        got, Pooling([mode])(Ragged(values.double(), np.array([600]))).float(), atol=1e-4, rtol=1e-5
    )


def test_a_sequence_without_tokens_is_no_vector_of_its_neighbour():
    with pytest.raises(ValueError, match="without tokens"):
        Pooling(["cls"])(Ragged(torch.ones(3, 8), np.array([3, 0])))


def test_a_chain_without_pooling_is_refused(tmp_path):
    path = sentence_transformer(tmp_path / "c", {})
    write_json(path / "modules.json", json.loads((path / "modules.json").read_text())[:1])
    with pytest.raises(CheckpointError, match="has nothing behind the Transformer"):
        dimensions(Checkpoint.read(path))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50),
            "model.safetensors cannot be read",
        ),
        (lambda folder: write_json(folder / "config.json", dense(32, 7)[1]), "do not fit its config.json"),
        (
            lambda folder: write_json(
                folder / "config.json", dense(32, 24, activation_function="os.system")[1]
            ),
            "'os.system' is no module of torch.nn",
        ),
    ],
)
def test_broken_links_name_their_folder(tmp_path, harm, message):
    path = sentence_transformer(tmp_path / "c", {"pooling_mode": "mean"}, [dense(32, 24)])
    harm(path / "2_Dense")
    with pytest.raises(CheckpointError, match=message):
        HEADS["dense"].load(Checkpoint.read(path), torch.device("cpu"), torch.float32)


def test_weights_may_be_a_pickle_of_tensors_only(tmp_path):
    path = sentence_transformer(tmp_path / "c", {"pooling_mode": "mean"}, [dense(32, 24)])
    folder = path / "2_Dense"
    expected = embed(path, TEXTS)
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    np.testing.assert_allclose(embed(path, TEXTS), expected)
    torch.save({"linear.weight": print}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        embed(path, TEXTS)


def test_flags_are_concatenated_in_a_fixed_order():
    assert pooling_modes({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": True}) == (
        "cls",
        "lasttoken",
    )
    assert pooling_modes({}) == ("mean",)
