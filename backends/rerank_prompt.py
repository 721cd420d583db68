"""How a language model is asked whether a document answers a query, and which of its words are the answer.

A prompt is made of pieces that are tokenised each on its own, as the model's makers do it. Each is a format
string with the slots {query}, {document} and {instruction}.

*Source:* the model cards of Qwen3-Reranker and mxbai-rerank-v2 (mxbai_rerank's mxbai_rerank_v2.py);
FlagEmbedding 1.4.2 inference/reranker/decoder_only/base.py; sentence-transformers 6.2
cross_encoder/modules/logit_score.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from backends.chat_template import read_pair_template
from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError
from backends.json_file import read_json

Word = str | int
"""A token by its text or by its id."""


@dataclass(frozen=True)
class RerankPrompt:
    """What stands around a query and a document, and what is read off the model's next word."""

    name: str
    plain: tuple[str, ...]
    """The pieces for a request without an instruction."""
    instructed: tuple[str, ...] | None
    """The pieces for a request with one; None where the prompt has no place for it."""
    true: Word
    false: Word | None
    """The score is the logit of `true`, less that of `false` where there is one."""
    is_probability: bool = False
    """Whether the model's makers give the probability of `true`, not a logit."""

    def pieces(self, instruction: str | None) -> tuple[str, ...]:
        """The pieces with the instruction in its place."""
        if instruction is None or self.instructed is None:
            return self.plain
        escaped = instruction.replace("{", "{{").replace("}", "}}")
        return tuple(piece.replace("{instruction}", escaped) for piece in self.instructed)


def _filled(pieces: Sequence[str], instruction: str) -> tuple[str, ...]:
    return tuple(piece.replace("{instruction}", instruction) for piece in pieces)


_QWEN3_PIECES = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    "the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
QWEN3 = RerankPrompt(
    "Qwen3-Reranker's",
    plain=_filled(
        _QWEN3_PIECES, "Given a web search query, retrieve relevant passages that answer the query"
    ),
    instructed=_QWEN3_PIECES,
    true="yes",
    false="no",
    is_probability=True,
)
_BGE_PIECES = ("<bos>", "A: {query}", "\n", "B: {document}", "\n", "{instruction}")
BGE_GEMMA = RerankPrompt(
    "bge-reranker-v2-gemma's",
    plain=_filled(
        _BGE_PIECES,
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by "
        "providing a prediction of either 'Yes' or 'No'.",
    ),
    instructed=_BGE_PIECES,
    true="Yes",
    false=None,
)
_MXBAI_TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each "
    "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
    "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
)
_MXBAI_SYSTEM = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
)
_MXBAI_REST = ("\n", "document: {document}", "\n", _MXBAI_TASK, "<|im_end|>\n<|im_start|>assistant\n")
MXBAI = RerankPrompt(
    "mxbai-rerank-v2's",
    plain=(_MXBAI_SYSTEM, "query: {query}", *_MXBAI_REST),
    instructed=(_MXBAI_SYSTEM, "instruction: {instruction}\nquery: {query}", *_MXBAI_REST),
    true="1",
    false="0",
)
_OF_MODEL_TYPE = {"qwen3": QWEN3, "gemma": BGE_GEMMA, "qwen2": MXBAI}


def rerank_prompt_of(checkpoint: Checkpoint) -> RerankPrompt | None:
    """How a checkpoint that is served as a reranker is asked; None for one that takes pairs as they are.

    Raises CheckpointError for a language model that nothing is known of.
    """
    if not is_language_model(checkpoint) and not _is_conversion(checkpoint):
        return None
    own = _OF_MODEL_TYPE.get(checkpoint.model_type)
    template = read_pair_template(checkpoint)
    if template is not None:
        # sentence-transformers reads these words off a language model that does not say which.
        words = (own.true, own.false) if own is not None else ("yes", "no")
        instructed = None if template.instructed is None else (template.instructed,)
        default = checkpoint.prompts.get(checkpoint.default_prompt_name or "")
        plain = template.plain
        if default and template.instructed is not None:
            plain = _filled([template.instructed], default.replace("{", "{{").replace("}", "}}"))[0]
        probability = own is not None and own.is_probability
        own = RerankPrompt("its chat template's", (plain,), instructed, *words, probability)
    score = next((module for module in checkpoint.modules if module.kind == "LogitScore"), None)
    if own is None:
        raise CheckpointError(
            f"{checkpoint.path} is a language model ({checkpoint.architecture}) without a chat "
            "template for a "
            "query and a document: how it is to be asked is not known"
        )
    if score is None:
        return own
    ids = score.config["true_token_id"], score.config.get("false_token_id")
    return replace(own, true=int(ids[0]), false=None if ids[1] is None else int(ids[1]))


def is_language_model(checkpoint: Checkpoint) -> bool:
    """Whether it has a language model's head to read the answer off."""
    return checkpoint.architecture.endswith("ForCausalLM")


def asks_for_a_word(checkpoint: Checkpoint) -> str | None:
    """Why a language model is taken for a reranker when nobody says what it is for; None when it is not.

    The same architecture stands in the config.json of Qwen3-Embedding and Qwen3-Reranker. What tells them
    apart: an embedding model has modules.json or a pooling, or a token behind every text.
    """
    if any(module.kind == "LogitScore" for module in checkpoint.modules):
        return "modules.json reads its score off the next word (LogitScore)"
    if not is_language_model(checkpoint) or checkpoint.has_modules:
        return None
    if checkpoint.model_type not in _OF_MODEL_TYPE or (checkpoint.path / "1_Pooling").is_dir():
        return None
    if (checkpoint.config.get("auto_map") or {}).get("AutoModel") or _appends_a_token(checkpoint):
        return None
    prompt = rerank_prompt_of(checkpoint)
    assert prompt is not None
    return (
        f"it is a bare language model, so a reranker; its prompt is {prompt.name} "
        "(an embedding model? give --task embed)"
    )


def _appends_a_token(checkpoint: Checkpoint) -> bool:
    """Whether the tokenizer puts a token behind every text."""
    if checkpoint.tokenizer_config.get("add_eos_token"):
        return True
    processor = read_json(checkpoint.transformer_path / "tokenizer.json").get("post_processor") or {}
    return any(
        "SpecialToken" in (template.get("single") or [{}])[-1]
        for template in [processor, *processor.get("processors", [])]
        if template.get("type") == "TemplateProcessing"
    )


def _is_conversion(checkpoint: Checkpoint) -> bool:
    """Whether a sequence classifier was made of such a language model: the same prompt, other weights."""
    if not checkpoint.architecture.endswith("ForSequenceClassification"):
        return False
    prompt = _OF_MODEL_TYPE.get(checkpoint.model_type)
    if prompt is None:
        return False
    names = label_names(checkpoint)
    if has_both_words(checkpoint, prompt):
        return True
    # Of one label nothing tells a conversion from another reranker but its name; Qwen3's are all conversions.
    return len(names) == 1 and (prompt is QWEN3 or _is_named_reranker(checkpoint))


def has_both_words(checkpoint: Checkpoint, prompt: RerankPrompt) -> bool:
    """Whether a classifier's two labels are the words of the prompt, the false one first."""
    return label_names(checkpoint) == [prompt.false, prompt.true]


def label_names(checkpoint: Checkpoint) -> list[str]:
    """config.json's names of labels, in their order."""
    named: Any = checkpoint.config.get("id2label") or {}
    return list(map(str, named.values() if isinstance(named, dict) else named))


def _is_named_reranker(checkpoint: Checkpoint) -> bool:
    # A hub's cache has the model's name three levels up.
    places = [*checkpoint.path.parts[-3:], str(checkpoint.config.get("_name_or_path", ""))]
    return any("rerank" in place.lower() for place in places)
