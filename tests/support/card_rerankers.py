"""Rerankers that are asked for a word, computed as their makers' model cards and packages do."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.decoders import TASK

Pairs = Sequence[tuple[str, str]]
_MXBAI_TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each "
    "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
    "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
)


def model_card(
    path: Path, pairs: Pairs, instruction: str = TASK, newlines: int = 2, max_length: int = 512
) -> np.ndarray:
    """The computation on Qwen3-Reranker's model card: padded on the left, softmax of two logits."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    prefix = tokenizer.encode(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
        'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        add_special_tokens=False,
    )
    suffix = tokenizer.encode(
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>" + "\n" * newlines, add_special_tokens=False
    )
    bodies = [f"<Instruct>: {instruction}\n<Query>: {q}\n<Document>: {d}" for q, d in pairs]
    inputs = tokenizer(
        bodies,
        padding=False,
        truncation="longest_first",
        return_attention_mask=False,
        max_length=max_length - len(prefix) - len(suffix),
    )
    inputs["input_ids"] = [prefix + ids + suffix for ids in inputs["input_ids"]]
    inputs = tokenizer.pad(inputs, padding=True, return_tensors="pt")
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    with torch.inference_mode():
        last = model(**inputs).logits[:, -1]
        both = torch.stack([last[:, no], last[:, yes]], dim=1)
        return torch.nn.functional.log_softmax(both, dim=1)[:, 1].exp().numpy()


def mxbai_rerank(path: Path, pairs: Pairs, instruction: str | None = None) -> np.ndarray:
    """mxbai_rerank's own computation (mxbai_rerank_v2.py), without truncation."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    system = (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
    )
    suffix = "<|im_end|>\n<|im_start|>assistant\n"
    rows = []
    for query, document in pairs:
        asked = f"query: {query}" if instruction is None else f"instruction: {instruction}\nquery: {query}"
        rows.append(
            ids(system)
            + ids(asked)
            + ids("\n")
            + ids(f"document: {document}")
            + ids("\n")
            + ids(_MXBAI_TASK)
            + ids(suffix)
        )
    inputs = tokenizer.pad({"input_ids": rows}, padding=True, return_tensors="pt")
    with torch.inference_mode():
        last = model(**inputs).logits[:, -1]
    return (last[:, ids("1")[0]] - last[:, ids("0")[0]]).numpy()
