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
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedModel

_WORDS = [
    "the",
    "a",
    "of",
    "to",
    "and",
    "is",
    "in",
    "it",
    "for",
    "this",
    "value",
    "return",
    "class",
    "object",
    "query",
]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation


def write_wordpiece(path: Path, max_length: int) -> int:
    """A BERT tokenizer whose vocabulary is made by rule: single characters and some words. Gives its size."""
    pieces = [*_SPECIAL, *_CHARACTERS, *(f"##{c}" for c in _CHARACTERS if c.isalnum()), *_WORDS]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    # Published files carry the padding and truncation of their training (all-MiniLM-L6-v2's does).
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    write_json(
        path / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": max_length},
    )
    return len(vocabulary)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Random weights that make errors visible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = "norm" in name.lower() and name.endswith("weight")
            weight.copy_(1 + 0.1 * noise if is_norm else 0.2 * noise)
    return model.eval()


def bert(path: Path, max_length: int = 64, seed: int = 0) -> Path:
    """A bare BertModel: config.json, weights, tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    size = write_wordpiece(path, max_length)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=max_length,
    )
    randomize(BertModel(config, add_pooling_layer=False), seed).save_pretrained(path)
    return path


FAMILIES: dict[str, Callable[[Path], Path]] = {"bert": bert}
"""A tiny checkpoint for every registered family; a test fails for a family that has none."""


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
