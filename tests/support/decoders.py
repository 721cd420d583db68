"""Tiny random checkpoints of decoders, in the layouts of the published embedding models and rerankers."""

import functools
import json
from pathlib import Path
from typing import Any

from tests.support.checkpoints import mistral, qwen2, qwen3, sentence_transformer
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
