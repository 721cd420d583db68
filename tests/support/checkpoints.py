"""Tiny random checkpoints in the published layouts.

Norm weights lie near 1 and matrices have a standard deviation of 0.2: with small random weights every
embedding has a cosine of 1.000 to every other, and no test could see an error.
"""

import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from transformers import PreTrainedModel

from tests.support.vocabularies import (
    write_gemma,
    write_json,
    write_llama,
    write_qwen,
    write_unigram,
    write_wordpiece,
)


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Random weights that make errors visible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = "norm" in name.lower() and name.endswith("weight")
            # Gemma's norms add one themselves.
            middle = 0 if type(model).__name__.startswith("Gemma") else 1
            weight.copy_(middle + 0.1 * noise if is_norm else 0.2 * noise)
    return model.eval()


_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def _make(
    path: Path,
    kind: str,
    architecture: str = "Model",
    *,
    max_length: int = 64,
    seed: int = 0,
    tokenizer: Callable[[Path, int], int] = write_wordpiece,
    **settings: Any,
) -> Path:
    """A checkpoint of transformers' `kind` classes with random weights."""
    path.mkdir(parents=True, exist_ok=True)
    size = tokenizer(path, max_length)
    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": size, "max_position_embeddings": max_length, **_SIZES, **settings}
    )
    model = getattr(transformers, f"{kind}{architecture}")(config)
    randomize(model, seed).save_pretrained(path)
    return path


def bert(
    path: Path, max_length: int = 64, seed: int = 0, architecture: str = "Model", **settings: Any
) -> Path:
    """A bare BertModel: config.json, weights, tokenizer."""
    return _make(path, "Bert", architecture, max_length=max_length, seed=seed, **settings)


def xlm_roberta(path: Path, max_length: int = 64, architecture: str = "Model", **settings: Any) -> Path:
    """Positions begin at 2, so there are two more of them than tokens."""
    return _make(
        path,
        "XLMRoberta",
        architecture,
        tokenizer=write_unigram,
        max_length=max_length,
        **{"max_position_embeddings": max_length + 2, "type_vocab_size": 1, "pad_token_id": 1, **settings},
    )


def roberta(path: Path, architecture: str = "Model", **settings: Any) -> Path:
    return _make(
        path,
        "Roberta",
        architecture,
        tokenizer=write_unigram,
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=1,
        **settings,
    )


def distilbert(path: Path, architecture: str = "Model", **settings: Any) -> Path:
    return _make(
        path,
        "DistilBert",
        architecture,
        dim=32,
        n_layers=3,
        n_heads=4,
        hidden_dim=64,
        num_hidden_layers=3,
        **settings,
    )


def modernbert(path: Path, architecture: str = "Model", window: int = 8, **settings: Any) -> Path:
    # Windows of 4 to either side: shorter than the sequences of the tests.
    return _make(
        path,
        "ModernBert",
        architecture,
        local_attention=window,
        global_attn_every_n_layers=3,
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
        **settings,
    )


def electra(path: Path, architecture: str = "Model", **settings: Any) -> Path:
    return _make(path, "Electra", architecture, embedding_size=16, **settings)


def albert(path: Path, architecture: str = "Model", **settings: Any) -> Path:
    return _make(path, "Albert", architecture, embedding_size=16, **settings)


def nomic_bert(path: Path, architecture: str = "Model", **settings: Any) -> Path:
    return _make(path, "NomicBert", architecture, **settings)


def gte(path: Path, architecture: str = "Model", **settings: Any) -> Path:
    return _make(path, "Gte", architecture, type_vocab_size=2, pad_token_id=0, **settings)


def jina_v3(path: Path, architecture: str = "Model", **settings: Any) -> Path:
    return _make(
        path,
        "JinaEmbeddingsV3",
        architecture,
        tokenizer=write_unigram,
        type_vocab_size=1,
        pad_token_id=1,
        **settings,
    )


def eurobert(path: Path, architecture: str = "Model", **settings: Any) -> Path:
    return _make(
        path,
        "EuroBert",
        architecture,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=2,
        **settings,
    )


def gemma3(path: Path) -> Path:
    # A window of 3 to either side.
    return _make(
        path,
        "Gemma3Text",
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        use_bidirectional_attention=True,
        pad_token_id=0,
    )


def llama(path: Path, architecture: str = "Model", **settings: Any) -> Path:
    return _decoder(path, "Llama", architecture, write_llama, **_SENTENCEPIECE_IDS, **settings)


def mistral(path: Path, architecture: str = "Model", window: int | None = 6, **settings: Any) -> Path:
    # A window shorter than the sequences of the tests. Padding is the end of sequence, as in E5-Mistral.
    ids = {**_SENTENCEPIECE_IDS, "pad_token_id": 2}
    return _decoder(
        path, "Mistral", architecture, write_llama, **{**ids, "sliding_window": window, **settings}
    )


def gemma(path: Path, architecture: str = "Model", **settings: Any) -> Path:
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    return _decoder(path, "Gemma", architecture, write_gemma, **{**ids, **settings})


def qwen2(path: Path, architecture: str = "Model", **settings: Any) -> Path:
    return _decoder(path, "Qwen2", architecture, write_qwen, **settings)


def qwen3(path: Path, architecture: str = "Model", **settings: Any) -> Path:
    return _decoder(path, "Qwen3", architecture, write_qwen, **settings)


_SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2}


def _decoder(
    path: Path, kind: str, architecture: str, default_tokenizer: Callable[[Path, int], int], **settings: Any
) -> Path:
    grouped = {"num_key_value_heads": 2, "head_dim": 16}
    defaults = {"tokenizer": default_tokenizer, "max_length": 512, **(grouped if kind != "Qwen2" else {})}
    return _make(path, kind, architecture, **{"num_key_value_heads": 2, **defaults, **settings})


def mpnet(path: Path, architecture: str = "Model", **settings: Any) -> Path:
    return _make(path, "MPNet", architecture, max_position_embeddings=66, pad_token_id=1, **settings)


def deberta(path: Path, architecture: str = "Model", **settings: Any) -> Path:
    return _make(
        path,
        "DebertaV2",
        architecture,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pad_token_id=0,
        **settings,
    )


def sentence_transformer(
    path: Path,
    pooling: dict[str, Any],
    links: Sequence[tuple[str, dict[str, Any]]] = (("Normalize", {}),),
    sentence: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
    base: Callable[[Path], Path] = bert,
) -> Path:
    """A checkpoint in the sentence-transformers layout: Transformer, Pooling, then `links` of (kind,
    config).
    """
    base(path)
    size = json.loads((path / "config.json").read_text())["hidden_size"]
    chain = [("Transformer", ""), ("Pooling", "1_Pooling")]
    chain += [(kind, f"{i}_{kind}") for i, (kind, _) in enumerate(links, 2)]
    write_json(
        path / "modules.json",
        [
            {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, folder) in enumerate(chain)
        ],
    )
    write_json(path / "1_Pooling" / "config.json", {"word_embedding_dimension": size, **pooling})
    write_json(
        path / "sentence_bert_config.json",
        {"max_seq_length": 48, "do_lower_case": False, **(transformer or {})},
    )
    write_json(path / "config_sentence_transformers.json", sentence or {})
    for i, (kind, config) in enumerate(links, 2):
        folder = path / f"{i}_{kind}"
        folder.mkdir()
        if kind in ("Dense", "LayerNorm"):
            write_json(folder / "config.json", config)
            safetensors.torch.save_file(_link_weights(kind, config, i), folder / "model.safetensors")
    return path


def _link_weights(kind: str, config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    if kind == "LayerNorm":
        return {"norm.weight": 1 + noise(config["dimension"]), "norm.bias": noise(config["dimension"])}
    weights = {"linear.weight": noise(config["out_features"], config["in_features"])}
    if config.get("bias", True):
        weights["linear.bias"] = noise(config["out_features"])
    if config.get("use_residual") and config["in_features"] != config["out_features"]:
        weights["residual.weight"] = noise(config["out_features"], config["in_features"])
    return weights


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def bge_m3(path: Path, max_length: int = 64, **settings: Any) -> Path:
    """BGE-M3's published files: an XLM-R, its two linear heads, and the sentence-transformers chain."""
    sentence_transformer(
        path,
        {"pooling_mode_cls_token": True},
        transformer={"max_seq_length": max_length},
        base=lambda p: xlm_roberta(p, max_length, **settings),
    )
    size = settings.get("hidden_size", 32)
    torch.save({"weight": noise(size, size, seed=1), "bias": noise(size, seed=2)}, path / "colbert_linear.pt")
    torch.save({"weight": noise(1, size, seed=10), "bias": torch.tensor([0.1])}, path / "sparse_linear.pt")
    return path


def splade(
    path: Path,
    base: Callable[[Path], Path] = lambda path: distilbert(path, "ForMaskedLM"),
    pooling: dict[str, Any] | None = None,
    max_length: int = 48,
) -> Path:
    """sentence-transformers' layout of a SPLADE model."""
    base(path)
    write_json(
        path / "modules.json",
        [
            {
                "idx": 0,
                "name": "0",
                "path": "",
                "type": "sentence_transformers.sparse_encoder.models.MLMTransformer",
            },
            {
                "idx": 1,
                "name": "1",
                "path": "1_SpladePooling",
                "type": "sentence_transformers.sparse_encoder.models.SpladePooling",
            },
        ],
    )
    write_json(path / "1_SpladePooling" / "config.json", pooling or {"pooling_strategy": "max"})
    write_json(path / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    write_json(path / "config_sentence_transformers.json", {"model_type": "SparseEncoder"})
    return path


def pylate(path: Path, base: Callable[[Path], Path] = bert, size: int = 16, **settings: Any) -> Path:
    """PyLate's layout up to its version 3: a Dense over tokens, the rest in one file."""
    base(path)
    hidden = json.loads((path / "config.json").read_text()).get("hidden_size", 32)
    write_json(
        path / "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"},
        ],
    )
    dense = {
        "in_features": hidden,
        "out_features": size,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    write_json(path / "1_Dense" / "config.json", dense)
    safetensors.torch.save_file(_link_weights("Dense", dense, 5), path / "1_Dense" / "model.safetensors")
    write_json(path / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False})
    write_json(
        path / "config_sentence_transformers.json",
        {
            "model_type": "ColBERT",
            "query_prefix": "[unused0] ",
            "document_prefix": "[unused1] ",
            "query_length": 16,
            "document_length": 40,
            "attend_to_expansion_tokens": False,
            "skiplist_words": list(string.punctuation),
            **settings,
        },
    )
    return path


def stanford(path: Path, size: int = 16) -> Path:
    """Stanford's layout: one file with BERT's weights and the projection, and artifact.metadata."""
    bert(path)
    file = path / "model.safetensors"
    weights = {f"bert.{name}": value for name, value in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(
        {**weights, "linear.weight": noise(size, 32, seed=7)}, file, metadata={"format": "pt"}
    )
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**config, "architectures": ["HF_ColBERT"]})
    write_json(
        path / "artifact.metadata", {"query_maxlen": 16, "doc_maxlen": 40, "attend_to_mask_tokens": False}
    )
    return path


_OWN_CODE = '''
import json
from pathlib import Path

import torch

from .scaling import times


class ScaledPooling(torch.nn.Module):
    """The mean of the tokens, without the first, times a number of its config.json."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    @classmethod
    def load(cls, path, subfolder="", **kwargs):
        return cls(json.loads((Path(path, subfolder) / "config.json").read_text())["scale"])

    def forward(self, features, **kwargs):
        mask = features["attention_mask"].clone()
        mask[:, 0] = 0
        mask = mask[..., None].to(features["token_embeddings"].dtype)
        total = (features["token_embeddings"] * mask).sum(1)
        features["sentence_embedding"] = times(total / mask.sum(1).clamp_min(1), self.scale)
        return features

    def save(self, path, **kwargs):
        pass
'''


def own_code(path: Path) -> Path:
    """A chain with a module that lies in a .py file of the checkpoint, beside a file that it imports."""
    sentence_transformer(path, {"pooling_mode": "mean"})
    (path / "my_pooling.py").write_text(_OWN_CODE)
    (path / "scaling.py").write_text("def times(values, scale):\n    return values * scale\n")
    write_json(path / "1_Scaled" / "config.json", {"scale": 3.0})
    types = [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Scaled", "my_pooling.ScaledPooling"),
    ]
    write_json(
        path / "modules.json",
        [{"idx": i, "name": str(i), "path": p, "type": kind} for i, (p, kind) in enumerate(types)],
    )
    return path


def classifier(
    path: Path, kind: Callable[..., Path], labels: int = 1, names: Sequence[str] = (), **settings: Any
) -> Path:
    """A *ForSequenceClassification checkpoint: a reranker with one label, a classifier with more."""
    id2label = {i: names[i] if names else f"LABEL_{i}" for i in range(labels)}
    kind(path, architecture="ForSequenceClassification", id2label=id2label, **settings)
    return path
