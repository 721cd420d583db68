"""Chains with modules that the checkpoint brings, against sentence-transformers."""

import json
import warnings

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError
from backends.options import ServingOptions
from backends.repository.pipeline import build_pipeline
from tests.support.checkpoints import own_code, write_json
from tests.support.pipeline import embed

TEXTS = ["what is the value", "a class", "x", "the value of the class; in it"]


@pytest.fixture
def path(tmp_path):
    return own_code(tmp_path / "c")


def build(path, **options):
    return build_pipeline("own", str(path), Checkpoint.read(path), ServingOptions(**options))


def append(path, kind, folder, config):
    modules = json.loads((path / "modules.json").read_text())
    modules.append({"idx": 9, "name": "9", "path": folder, "type": kind})
    write_json(path / "modules.json", modules)
    write_json(path / folder / "config.json", config)


def test_equals_sentence_transformers(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SentenceTransformer(str(path), device="cpu", local_files_only=True, trust_remote_code=True)
    got = embed(path, TEXTS)
    np.testing.assert_allclose(got, model.encode(TEXTS), atol=1e-5)
    assert np.abs(np.roll(got, 1, axis=0) - model.encode(TEXTS)).max() > 0.1


def test_a_normalize_behind_it(path):
    plain = embed(path, TEXTS)
    append(path, "sentence_transformers.models.Normalize", "2_Normalize", {})
    expected = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(embed(path, TEXTS), expected, atol=1e-6)


def test_a_module_that_changes_tokens_before_the_pooling(path):
    code = path / "twice.py"
    code.write_text(
        "import torch\n"
        "class Twice(torch.nn.Module):\n"
        "    load = classmethod(lambda cls, path: cls())\n"
        "    def forward_args(self):\n"
        "        return ['token_embeddings', 'input_lengths']\n"
        "    def forward(self, features):\n"
        "        assert set(features) == {'token_embeddings', 'input_lengths'}\n"
        "        return {'token_embeddings': features['token_embeddings'] * 2}\n"
    )
    pooling = json.loads((path / "1_Pooling" / "config.json").read_text())
    kinds = [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
    ]
    modules = [{"idx": i, "name": str(i), "path": p, "type": t} for i, (p, t) in enumerate(kinds)]
    write_json(path / "modules.json", modules)
    plain = embed(path, TEXTS)
    modules.insert(1, {"idx": 1, "name": "1", "path": "1_Twice", "type": "twice.Twice"})
    write_json(path / "modules.json", modules)
    write_json(path / "1_Pooling" / "config.json", pooling)
    np.testing.assert_allclose(embed(path, TEXTS), plain * 2, rtol=1e-5)


def test_files_beside_it_by_their_bare_names(path):
    """RTP-LLM puts the checkpoint on the path of modules."""
    expected = embed(path, TEXTS)
    code = (path / "my_pooling.py").read_text().replace("from .scaling import", "from scaling import")
    (path / "my_pooling.py").write_text(code)
    np.testing.assert_allclose(embed(path, TEXTS), expected)


def test_it_must_be_trusted(path):
    with pytest.raises(CheckpointError, match=r"names ScaledPooling, a class in .*my_pooling.py: code that"):
        build(path)
    pipeline = build(path, trust_remote_code=True)
    assert "dimensions" not in pipeline.parameters, "only the code knows"
    assert pipeline.reasons["dense"] == "its tokens are pooled (own code)"
    # The encoder alone runs nothing of it.
    assert build(path, task="ALL_EMBEDDING").parameters["tasks"] == "tokens"


def test_the_size_that_its_config_tells(path):
    write_json(path / "1_Scaled" / "config.json", {"scale": 3.0, "embedding_dimension": 32})
    assert build(path, trust_remote_code=True).parameters["dimensions"] == "32"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('no')", "ScaledPooling cannot be loaded: RuntimeError: no"),
        ("x = 1", "cannot be loaded: AttributeError"),
        ("class ScaledPooling:\n    load = classmethod(lambda cls, path: 3)", "load gave no torch.nn.Module"),
        (
            "import torch\nclass ScaledPooling(torch.nn.Module):\n    load = classmethod(lambda c, p: c())\n"
            "    def forward_args(self):\n        return ['moe_gating']",
            "ScaledPooling wants moe_gating, which is not given to modules; they may have input_lengths",
        ),
    ],
)
def test_code_that_fails_is_told(path, code, message):
    (path / "my_pooling.py").write_text(code)
    with pytest.raises(CheckpointError, match=message):
        embed(path, TEXTS)


def test_a_class_of_an_installed_package_is_not_the_checkpoint_s(path):
    modules = json.loads((path / "modules.json").read_text())
    modules[1]["type"] = "os.path.Thing"
    write_json(path / "modules.json", modules)
    with pytest.raises(CheckpointError, match=r"names os\.path\.Thing, which is not served"):
        build(path, trust_remote_code=True)


def test_its_own_class_is_run_whatever_its_name(path):
    """Even under a name that is one of sentence-transformers' own."""
    (path / "mine.py").write_text(
        "import torch\n"
        "class Normalize(torch.nn.Module):\n"
        "    load = classmethod(lambda cls, path: cls())\n"
        "    def forward(self, features):\n"
        "        return {'sentence_embedding': features['sentence_embedding'] * 0 + 7}\n"
    )
    append(path, "mine.Normalize", "2_Normalize", {})
    assert (embed(path, TEXTS) == 7).all()


def test_unknown_modules_beside_it_are_refused(path):
    append(path, "sentence_transformers.models.CNN", "2_CNN", {})
    with pytest.raises(
        CheckpointError, match="holds the module CNN, which is not served; beside its own classes"
    ):
        embed(path, TEXTS)
