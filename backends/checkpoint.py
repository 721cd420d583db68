"""Reads a checkpoint directory in its published layout and tells what can be served from it.

*Source:* the layout that sentence-transformers 6.2 reads (modules.json, 1_Pooling/config.json,
sentence_bert_config.json, config_sentence_transformers.json) over transformers' config.json and
tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.errors import CheckpointError
from backends.json_file import read_json
from backends.model_config import hidden_size, language_config, positions
from backends.weight_files import check_weights

# The first of these that exists holds the settings of the Transformer module.
_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# The last ones are what transformers makes a tokenizer of where there is no tokenizer.json.
_TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
)
# What a chain of modules may begin with: the names of one module in several versions.
_TRANSFORMERS = ("Transformer", "MLMTransformer")
# Packages whose classes are known here by name; a class of any other module is the checkpoint's own code.
_KNOWN_PACKAGES = ("sentence_transformers", "pylate")
MULTIMODAL = ("clip", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Models of texts and images, by config.json's model_type."""
# What checkpoints call their prompts for queries and for documents.
_ROLE_PROMPTS = {
    "query": ("query", "web_search_query", "search_query", "retrieval.query", "s2p_query"),
    "document": ("document", "passage", "corpus", "search_document", "retrieval.passage"),
}
# The tokenizer's way to say that it knows no limit is a huge number (transformers' VERY_LARGE_INTEGER is
# 1e30).
NO_LIMIT = 1_000_000_000


@dataclass(frozen=True)
class Module:
    """One link of the sentence-transformers chain after the transformer."""

    kind: str
    """The last part of its type: Pooling, Dense, LayerNorm, Normalize."""
    path: Path
    """Where its weights lie."""
    config: Mapping[str, Any] = field(default_factory=dict)
    code: Path | None = None
    """The file inside the checkpoint that defines the class, for a module that its maker wrote."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint directory says of itself."""

    path: Path
    config: Mapping[str, Any]
    """config.json."""
    transformer_path: Path
    """Where config.json, the weights and the tokenizer lie: `path`, or the Transformer module's own
    folder.
    """
    has_modules: bool
    """Whether there is a modules.json."""
    modules: tuple[Module, ...]
    """The chain behind the transformer, from modules.json or by the rules for checkpoints without one."""
    prompts: Mapping[str, str]
    default_prompt_name: str | None
    max_length: int
    """Tokens of one text, special tokens included."""
    notes: tuple[str, ...]
    """What had to be guessed of the chain, for the person who serves it."""
    sentence_config: Mapping[str, Any]
    """config_sentence_transformers.json."""
    transformer_config: Mapping[str, Any]
    """sentence_bert_config.json, or the same under one of its other names."""
    tokenizer_config: Mapping[str, Any]
    """tokenizer_config.json."""
    rerank_prompt: str | None
    """What a person says of the prompt around a reranker's pairs, where the checkpoint does not tell."""
    lowercases: bool
    """Whether sentence-transformers lower-cases texts before the tokenizer's own normaliser does its work."""

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def architecture(self) -> str:
        """config.json's first architecture, such as BertModel; empty when it names none."""
        return str((self.config.get("architectures") or [""])[0])

    @property
    def language_config(self) -> dict[str, Any]:
        """config.json, or the part of it that is about texts."""
        return language_config(self.config)

    @property
    def is_multimodal(self) -> bool:
        """Whether it is a model of texts and images."""
        return self.model_type in MULTIMODAL

    @property
    def hidden_size(self) -> int:
        return int(hidden_size(self.config))

    @property
    def positions(self) -> int | None:
        """Positions that the model has, those of padding included; None where it does not tell."""
        return positions(self.config)

    @property
    def sentence_model_type(self) -> str:
        """SentenceTransformer, CrossEncoder, SparseEncoder, MultiVectorEncoder, ColBERT ..."""
        return str(self.sentence_config.get("model_type") or "SentenceTransformer")

    @property
    def truncate_dim(self) -> int | None:
        """How many components of an embedding the checkpoint lets out; None is all."""
        declared = self.sentence_config.get("truncate_dim")
        return None if declared is None else int(declared)

    @property
    def role_prompts(self) -> dict[str, str]:
        """The prompts for queries and for documents, where the checkpoint has them; they may be empty.

        Where there is one for queries only, documents go without. *Source:* sentence-transformers 6.2,
        encode_query and encode_document, for the names that come first; E5-Mistral and others have more.
        """
        found = {
            role: next((self.prompts[name] for name in names if name in self.prompts), None)
            for role, names in _ROLE_PROMPTS.items()
        }
        if found["query"] is not None and found["document"] is None:
            found["document"] = ""
        return {role: prompt for role, prompt in found.items() if prompt is not None}

    @property
    def matryoshka_dimensions(self) -> tuple[int, ...]:
        """The sizes that its embeddings may be cut to, where it lists them, ascending."""
        declared = self.config.get("matryoshka_dimensions") or self.sentence_config.get(
            "matryoshka_dimensions"
        )
        return tuple(sorted(int(size) for size in declared or ()))

    @property
    def label_names(self) -> list[str]:
        """config.json's names of labels, in their order."""
        named = self.config.get("id2label") or {}
        return list(map(str, named.values() if isinstance(named, dict) else named))

    def side_file(self, stem: str) -> Path | None:
        """A file of weights beside the model's own, such as colbert_linear.pt; None when it is not there."""
        files = (self.path / f"{stem}{suffix}" for suffix in (".safetensors", ".pt"))
        return next((file for file in files if file.is_file()), None)

    @classmethod
    def read(cls, path: Path, max_length: int | None = None, rerank_prompt: str | None = None) -> Checkpoint:
        """Reads the small files only. Raises CheckpointError, which names the file and what is wrong with it.

        `max_length` lowers the checkpoint's own limit; it cannot raise it over what the positions allow.
        """
        try:
            return cls._read(path, max_length, rerank_prompt)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the configuration files in {path} are not in the published layout: {error!r}"
            ) from error

    @classmethod
    def _read(cls, path: Path, max_length: int | None, rerank_prompt: str | None) -> Checkpoint:
        declared = _declared_modules(path)
        transformer_path = path / declared[0][1] if declared else path
        config = read_json(transformer_path / "config.json", required=True)
        _check_transformer(path, declared, config)
        if not isinstance(config.get("architectures") or [], list):
            raise CheckpointError(f"{transformer_path / 'config.json'}: architectures is no list")
        if not isinstance(hidden_size(config), int):
            raise CheckpointError(f"{transformer_path / 'config.json'} has no hidden_size")
        check_weights(transformer_path)
        if not any((transformer_path / name).is_file() for name in _TOKENIZERS):
            raise CheckpointError(f"{transformer_path} has no tokenizer; a tokenizer.json belongs there")
        transformer = next(
            (found for name in _TRANSFORMER_CONFIGS if (found := read_json(transformer_path / name))), {}
        )
        sentence = read_json(path / "config_sentence_transformers.json")
        if not all(isinstance(text, str) for text in (sentence.get("prompts") or {}).values()):
            raise CheckpointError(f"{path / 'config_sentence_transformers.json'}: prompts must be texts")
        prompts = dict(sentence.get("prompts") or {})
        default_prompt_name = sentence.get("default_prompt_name")
        if default_prompt_name is not None and default_prompt_name not in prompts:
            raise CheckpointError(
                f"{path / 'config_sentence_transformers.json'}: default_prompt_name is "
                f"{default_prompt_name!r}, which is not one of its prompts "
                f"({', '.join(prompts) or 'it has none'})"
            )
        modules, notes = _modules(path, config, declared)
        made = cls(
            path=path,
            config=config,
            transformer_path=transformer_path,
            has_modules=bool(declared),
            modules=modules,
            notes=notes,
            prompts=prompts,
            default_prompt_name=default_prompt_name,
            max_length=_max_length(transformer_path, config, transformer, max_length),
            sentence_config=sentence,
            transformer_config=transformer,
            tokenizer_config=read_json(transformer_path / "tokenizer_config.json"),
            rerank_prompt=rerank_prompt,
            lowercases=bool(transformer.get("do_lower_case")),
        )
        # Read here, so that a value of another kind is told with the rest.
        _ = made.truncate_dim, made.matryoshka_dimensions
        return made


def _declared_modules(path: Path) -> list[tuple[str, str, str]]:
    """(kind, folder, dotted type) of every entry of modules.json, the Transformer first; empty
    without the file.
    """
    file = path / "modules.json"
    if not file.is_file():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        declared = [(e["type"].rsplit(".", 1)[-1], str(e.get("path") or ""), e["type"]) for e in entries]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a list of modules with a type and a path: {error!r}") from error
    if not declared:
        raise CheckpointError(f"{file} is empty; only chains that begin with a Transformer can be served")
    for i, (_, folder, dotted) in enumerate(declared):
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise CheckpointError(f"{file} has the path {folder!r}, which leads out of the checkpoint")
        is_known = dotted.split(".")[0] in _KNOWN_PACKAGES
        if not is_known and i and _own_code(path, dotted) is None:
            raise CheckpointError(
                f"{file} names {dotted}, which is not served: a module may be of "
                f"{', '.join(_KNOWN_PACKAGES)} or, behind the Transformer, a class in a .py file of the "
                "checkpoint"
            )
    return declared


def _check_transformer(path: Path, declared: list[tuple[str, str, str]], config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a chain that begins with anything but a Transformer.

    Models of texts and images may bring one of their own, which is not run: their family does its work.
    """
    for kind, _, dotted in declared[:1]:
        is_known = dotted.split(".")[0] in _KNOWN_PACKAGES and kind in _TRANSFORMERS
        is_own = config.get("model_type") in MULTIMODAL and kind.endswith(("Transformer", "CLIPModel"))
        if not is_known and not is_own:
            raise CheckpointError(
                f"{path / 'modules.json'} begins with {dotted}; only chains that begin with a Transformer of "
                f"{', '.join(_KNOWN_PACKAGES)} can be served"
            )


def _modules(
    path: Path, config: Mapping[str, Any], declared: list[tuple[str, str, str]]
) -> tuple[tuple[Module, ...], tuple[str, ...]]:
    """The chain, and what had to be guessed of it."""
    if declared:
        chain = tuple(
            Module(
                kind,
                path / folder,
                # The root's config.json is the transformer's.
                read_json(path / folder / "config.json", required=kind == "Pooling") if folder else {},
                _own_code(path, dotted),
            )
            for kind, folder, dotted in declared[1:]
            # It does nothing outside training.
            if kind != "Dropout" or _own_code(path, dotted) is not None
        )
        if config.get("model_type") == "clip" and not any(module.kind == "Pooling" for module in chain):
            # CLIP pools itself, and so does sentence-transformers' module for it.
            chain = (Module("Pooling", path, {"pooling_mode": "lasttoken"}), *chain)
        return chain, ()
    if config.get("model_type") in MULTIMODAL:
        last = Module("Pooling", path / "1_Pooling", {"pooling_mode": "lasttoken"})
        return (last, Module("Normalize", path / "2_Normalize")), ()
    pooling = path / "1_Pooling"
    if (pooling / "config.json").is_file():
        note = "it has no modules.json: its embeddings are pooled as 1_Pooling says, and not normalised"
        return (Module("Pooling", pooling, read_json(pooling / "config.json")),), (note,)
    if (path / "sparse_linear.pt").is_file() and (path / "colbert_linear.pt").is_file():
        # As FlagEmbedding saves a BGE-M3 that it has trained.
        chain = (
            Module("Pooling", pooling, {"pooling_mode": "cls"}),
            Module("Normalize", path / "2_Normalize"),
        )
        return chain, ("it has no modules.json: its embeddings are made as BGE-M3's, [CLS] and normalised",)
    # *Source:* sentence-transformers 6.2 gives a bare transformer mean pooling, a causal language model its
    # last token, and neither a Normalize.
    architecture = str((config.get("architectures") or [""])[0])
    is_causal = architecture.endswith("ForCausalLM") and config.get("is_causal") is not False
    mode = "lasttoken" if is_causal else "mean"
    note = (
        f"it has no modules.json: its embeddings are the {mode} of its tokens, not normalised, as "
        "sentence-transformers makes them; if it was trained otherwise, they are wrong"
    )
    return (Module("Pooling", pooling, {"pooling_mode": mode}),), (note,)


def _own_code(path: Path, dotted: str) -> Path | None:
    """The file inside the checkpoint that a module's type names, as in my_pooling.MyPooling."""
    if "." not in dotted or dotted.split(".")[0] in _KNOWN_PACKAGES:
        return None
    parts = dotted.split(".")[:-1]
    if not all(part.isidentifier() for part in parts):
        return None
    file = path.joinpath(*parts).with_suffix(".py")
    return file if file.is_file() else None


def _max_length(
    path: Path, config: Mapping[str, Any], transformer: Mapping[str, Any], wanted: int | None
) -> int:
    most = positions(config) or NO_LIMIT
    declared = transformer.get("max_seq_length")
    if declared is None:
        declared = read_json(path / "tokenizer_config.json").get("model_max_length")
    own = min(int(declared) if declared is not None else NO_LIMIT, most)
    if wanted is None and own >= NO_LIMIT:
        raise CheckpointError(f"{path} does not tell how long a text may be; give --max-length")
    return own if wanted is None else wanted
