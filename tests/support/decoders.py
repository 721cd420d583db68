"""Tiny random checkpoints of decoders, in the layouts of the published embedding models and rerankers."""

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer

from tests.support.checkpoints import gemma, mistral, qwen2, qwen3, sentence_transformer
from tests.support.vocabularies import ENDOFTEXT, write_json, write_llama, write_qwen

TASK = "Given a web search query, retrieve relevant passages that answer the query"
LAST_TOKEN = {"pooling_mode_lasttoken": True, "include_prompt": True}


def e5_mistral(path: Path, **settings: Any) -> Path:
    """intfloat/e5-mistral-7b-instruct: </s> is named in tokenizer_config.json only, prompts by their task."""
    tokenizer = functools.partial(write_llama, add_eos_token=True)
    return sentence_transformer(
        path,
        LAST_TOKEN,
        sentence={
            "prompts": {
                "web_search_query": f"Instruct: {TASK}\nQuery: ",
                "sts_query": "Instruct: Retrieve semantically similar text.\nQuery: ",
            }
        },
        transformer={"max_seq_length": 256},
        base=lambda p: mistral(p, tokenizer=tokenizer, **settings),
    )


def gte_qwen2(path: Path, *, adds_eos: bool = True, **settings: Any) -> Path:
    """Alibaba-NLP/gte-Qwen2-7B-instruct: both ways and the last token are in code that it brings."""
    config = {"add_eos_token": True} if adds_eos else {}
    tokenizer = functools.partial(write_qwen, **config, eos_token=ENDOFTEXT)
    sentence_transformer(
        path,
        LAST_TOKEN,
        sentence={"prompts": {"query": f"Instruct: {TASK}\nQuery: "}},
        transformer={"max_seq_length": 256},
        base=lambda p: qwen2(p, "ForCausalLM", tokenizer=tokenizer, tie_word_embeddings=False, **settings),
    )
    change_config(path, auto_map={"AutoModel": "modeling_qwen.Qwen2Model"})
    (path / "modeling_qwen.py").write_text("raise SystemExit('this must not run')")
    return path


def qwen3_embedding(path: Path, **settings: Any) -> Path:
    """Qwen/Qwen3-Embedding: the post-processor has the last token, the tensors no prefix."""
    tokenizer = functools.partial(write_qwen, has_eos=True)
    sentence_transformer(
        path,
        LAST_TOKEN,
        sentence={"prompts": {"query": f"Instruct: {TASK}\nQuery:", "document": ""}},
        base=lambda p: qwen3(p, tokenizer=tokenizer, **settings),
    )
    # It has none.
    (path / "sentence_bert_config.json").unlink()
    change_config(path, architectures=["Qwen3ForCausalLM"])
    return path


def change_config(path: Path, **entries: Any) -> None:
    """Changes entries of config.json; None takes one out."""
    config = {**json.loads((path / "config.json").read_text()), **entries}
    write_json(path / "config.json", {name: value for name, value in config.items() if value is not None})


def qwen3_reranker(path: Path, **settings: Any) -> Path:
    """Qwen/Qwen3-Reranker as first published: a bare language model, and Qwen3's ordinary chat template."""
    return qwen3(
        path,
        "ForCausalLM",
        tokenizer=functools.partial(write_qwen, chat_template=_CHAT),
        tie_word_embeddings=True,
        **settings,
    )


def bge_gemma(path: Path, **settings: Any) -> Path:
    """BAAI/bge-reranker-v2-gemma."""
    return gemma(path, "ForCausalLM", **settings)


def mxbai_v2(path: Path, **settings: Any) -> Path:
    """mixedbread-ai/mxbai-rerank-base-v2."""
    settings = {"tie_word_embeddings": True, **settings}
    return qwen2(
        path, "ForCausalLM", tokenizer=functools.partial(write_qwen, chat_template=_CHAT), **settings
    )


# As Qwen's: it knows the roles of a conversation only.
_CHAT = (
    "{%- for message in messages %}{%- if message.role in ('user', 'system', 'assistant') %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# With the roles of a reranker, and with a newline to spare: one is lost.
PAIR_CHAT = (
    "<|im_start|>system\nJudge the Document.<|im_end|>\n<|im_start|>user\n"
    "<Instruct>: {{ messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first "
    "| default('" + TASK + "') }}\n"
    "<Query>: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "<Document>: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n\n"
)


def with_pair_template(path: Path, template: str = PAIR_CHAT) -> Path:
    """Gives a checkpoint a chat template with the roles query and document."""
    (path / "chat_template.jinja").write_text(template)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    write_json(path / "tokenizer_config.json", config)
    return path


def with_logit_score(path: Path, true: int, false: int | None) -> Path:
    """Gives a language model the modules.json of a CrossEncoder (sentence-transformers 5.4 and later)."""
    modules = [
        ("", "sentence_transformers.base.modules.transformer.Transformer"),
        ("1_LogitScore", "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"),
    ]
    write_json(
        path / "modules.json",
        [{"idx": i, "name": str(i), "path": p, "type": kind} for i, (p, kind) in enumerate(modules)],
    )
    write_json(path / "1_LogitScore" / "config.json", {"true_token_id": true, "false_token_id": false})
    write_json(
        path / "sentence_bert_config.json",
        {
            "transformer_task": "text-generation",
            "modality_config": {
                "text": {"method": "forward", "method_output_name": "logits"},
                "message": {"method": "forward", "method_output_name": "logits", "format": "flat"},
            },
            "module_output_name": "causal_logits",
        },
    )
    write_json(path / "config_sentence_transformers.json", {"model_type": "CrossEncoder"})
    return path


def converted(path: Path, original: Path, words: Sequence[str], labels: Sequence[str] = ("LABEL_0",)) -> Path:
    """The sequence classifier that people make of a language model: rows of its head, or their difference."""
    tokenizer = Tokenizer.from_file(str(original / "tokenizer.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(original)
    rows = [model.get_output_embeddings().weight[tokenizer.token_to_id(word)] for word in words]
    weight = torch.stack(rows) if len(labels) > 1 else (rows[1] - rows[0])[None]
    shutil.copytree(original, path)
    (path / "model.safetensors").unlink()
    tensors = {f"model.{name}": value for name, value in model.model.state_dict().items()}
    safetensors.torch.save_file(
        {**tensors, "score.weight": weight.detach().contiguous()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    architecture = type(model).__name__.replace("ForCausalLM", "ForSequenceClassification")
    pad = Tokenizer.from_file(str(original / "tokenizer.json")).token_to_id(ENDOFTEXT)
    change_config(
        path,
        architectures=[architecture],
        id2label={str(i): name for i, name in enumerate(labels)},
        label2id={name: i for i, name in enumerate(labels)},
        pad_token_id=pad,
    )
    return path


def formatted_pairs(pairs: Sequence[tuple[str, str]], instruction: str = TASK) -> list[tuple[str, str]]:
    """As the cards of Qwen3-Reranker's conversions say: the prompt is written into the texts by hand."""
    before = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
        'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        f"<Instruct>: {instruction}\n<Query>: "
    )
    behind = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    return [(f"{before}{query}\n", f"<Document>: {document}{behind}") for query, document in pairs]


def without_chat_template(source: Path, path: Path) -> Path:
    """A copy for sentence-transformers, which takes the template of a conversation for one of pairs."""
    shutil.copytree(source, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    write_json(path / "tokenizer_config.json", config)
    return path


def qwen3_embedding_shapes(path: Path, layers: int = 28) -> Path:
    """The shapes of Qwen3-Embedding-0.6B in bfloat16, in two shards: 1.2 GB of repeated noise if it has all
    its layers.
    """
    config = transformers.Qwen3Config(
        vocab_size=151669,
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = transformers.Qwen3Model(config)
    noise = torch.randn(2**21 + 17, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16) * 0.03
    tensors = {}
    for name, weight in model.state_dict().items():
        if weight.ndim == 1:
            tensors[name] = torch.ones(weight.shape, dtype=torch.bfloat16)
        else:
            repeats = -(-weight.numel() // len(noise))
            tensors[name] = noise.repeat(repeats)[: weight.numel()].view(weight.shape)
    sentence_transformer(
        path,
        LAST_TOKEN,
        sentence={"prompts": {"query": f"Instruct: {TASK}\nQuery:", "document": ""}},
        transformer={"max_seq_length": 32768},
        base=lambda p: qwen3(p, tokenizer=functools.partial(write_qwen, has_eos=True)),
    )
    (path / "model.safetensors").unlink()
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(path)
    write_json(path / "1_Pooling" / "config.json", {"word_embedding_dimension": 1024, **LAST_TOKEN})
    names = list(tensors)
    places = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        safetensors.torch.save_file({n: tensors[n] for n in part}, path / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, file))
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return path
