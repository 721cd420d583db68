"""How a language model is asked whether a document answers a query, and which of its words are the answer.

*Source:* the model cards of Qwen3-Reranker and mxbai-rerank-v2 (mxbai_rerank's mxbai_rerank_v2.py);
FlagEmbedding 1.4.2 inference/reranker/decoder_only/base.py; sentence-transformers 6.2
cross_encoder/modules/logit_score.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from backends.chat_template import read_pair_template
from backends.checkpoint import Checkpoint
from backends.conversion import is_made_of_words
from backends.errors import CheckpointError
from backends.json_file import read_json
from backends.prompt_pieces import Piece, Slot

Word = str | int
"""A token by its text or by its id."""


@dataclass(frozen=True)
class RerankPrompt:
    """What stands around a query and a document, and what is read off the model's next word."""

    name: str
    pieces: tuple[Piece, ...]
    """For a request with an instruction; tokenised each on its own, as the model's makers do."""
    true: Word
    false: Word | None
    """The score is the logit of `true`, less that of `false` where there is one."""
    default: str | None = None
    """The instruction of a request that has none."""
    plain: tuple[Piece, ...] | None = None
    """The pieces for a request without an instruction, where there is no default."""
    is_probability: bool = False
    """Whether the model's makers give the probability of `true`, not a logit."""

    @property
    def takes_instruction(self) -> bool:
        """Whether it has a place for one."""
        return any(piece.has(Slot.INSTRUCTION) for piece in self.pieces)

    def ask(self, instruction: str | None) -> tuple[tuple[Piece, ...], str]:
        """The pieces for a request, and the instruction that goes into them."""
        if instruction is None and self.plain is not None:
            return self.plain, ""
        return self.pieces, instruction or self.default or ""


def _pieces(*texts: str) -> tuple[Piece, ...]:
    return tuple(map(Piece.of, texts))


QWEN3 = RerankPrompt(
    "Qwen3-Reranker's",
    _pieces(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
        'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    true="yes",
    false="no",
    default="Given a web search query, retrieve relevant passages that answer the query",
    is_probability=True,
)
BGE_GEMMA = RerankPrompt(
    "bge-reranker-v2-gemma's",
    _pieces("<bos>", "A: {query}", "\n", "B: {document}", "\n", "{instruction}"),
    true="Yes",
    false=None,
    default="Given a query A and a passage B, determine whether the passage contains an answer to the query "
    "by providing a prediction of either 'Yes' or 'No'.",
)
_MXBAI_SYSTEM = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
)
_MXBAI_REST = (
    "\n",
    "document: {document}",
    "\n",
    "You are a search relevance expert who evaluates how well documents match search queries. For each "
    "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
    "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:",
    "<|im_end|>\n<|im_start|>assistant\n",
)
MXBAI = RerankPrompt(
    "mxbai-rerank-v2's",
    _pieces(_MXBAI_SYSTEM, "instruction: {instruction}\nquery: {query}", *_MXBAI_REST),
    plain=_pieces(_MXBAI_SYSTEM, "query: {query}", *_MXBAI_REST),
    true="1",
    false="0",
)
PROMPTS = {"qwen3": QWEN3, "bge-gemma": BGE_GEMMA, "mxbai": MXBAI}
"""By what the option rerank_prompt calls them."""
_OF_MODEL_TYPE = {"qwen3": "qwen3", "gemma": "bge-gemma", "qwen2": "mxbai"}


def rerank_prompt_of(checkpoint: Checkpoint) -> RerankPrompt | None:
    """How a checkpoint that is served as a reranker is asked; None for one that takes pairs as they are.

    Raises CheckpointError for a language model that nothing is known of.
    """
    wanted = checkpoint.rerank_prompt
    if wanted == "none" or not (is_language_model(checkpoint) or _is_classifier(checkpoint)):
        return None
    own = PROMPTS[wanted] if wanted in PROMPTS else _own_prompt(checkpoint)
    template = _chat_prompt(checkpoint, own) if wanted not in PROMPTS else None
    if wanted == "chat-template" and template is None:
        raise CheckpointError(
            f"{checkpoint.path} has no chat template that knows the roles query and document; give another "
            "--rerank-prompt"
        )
    if wanted is None and template is None and _is_classifier(checkpoint):
        return own if own is not None and _is_conversion(checkpoint, own) else None
    prompt = template or own
    if prompt is None:
        raise CheckpointError(
            f"{checkpoint.path} is a language model ({checkpoint.architecture}) without a chat template for "
            "a query and a document: how it is to be asked is not known; give --rerank-prompt, one of "
            f"{', '.join(PROMPTS)}"
        )
    return _with_words(checkpoint, prompt)


def _own_prompt(checkpoint: Checkpoint) -> RerankPrompt | None:
    name = _OF_MODEL_TYPE.get(checkpoint.model_type)
    return None if name is None else PROMPTS[name]


def _chat_prompt(checkpoint: Checkpoint, own: RerankPrompt | None) -> RerankPrompt | None:
    found = read_pair_template(checkpoint)
    if found is None:
        return None
    plain, instructed = found
    default = checkpoint.prompts.get(checkpoint.default_prompt_name or "") or None
    return RerankPrompt(
        "its chat template's",
        (instructed or plain,),
        # sentence-transformers reads these words off a language model that does not say which.
        true="yes" if own is None else own.true,
        false="no" if own is None else own.false,
        default=default if instructed is not None else None,
        plain=None if default and instructed is not None else (plain,),
        is_probability=own is not None and own.is_probability,
    )


def _with_words(checkpoint: Checkpoint, prompt: RerankPrompt) -> RerankPrompt:
    """The prompt with the words that modules.json names, if it does."""
    score = next((module for module in checkpoint.modules if module.kind == "LogitScore"), None)
    if score is None:
        return prompt
    true, false = score.config.get("true_token_id"), score.config.get("false_token_id")
    if not isinstance(true, int) or not (false is None or isinstance(false, int)):
        raise CheckpointError(f"{score.path}/config.json: true_token_id and false_token_id are no token ids")
    return replace(prompt, true=true, false=false)


def is_language_model(checkpoint: Checkpoint) -> bool:
    """Whether it has a language model's head to read the answer off."""
    return checkpoint.architecture.endswith("ForCausalLM")


def _is_classifier(checkpoint: Checkpoint) -> bool:
    is_known = checkpoint.model_type in _OF_MODEL_TYPE or checkpoint.rerank_prompt is not None
    return is_known and checkpoint.architecture.endswith("ForSequenceClassification")


def asks_for_a_word(checkpoint: Checkpoint) -> str | None:
    """Why a language model is taken for a reranker when nobody says what it is for; None when it is not.

    The same architecture stands in the config.json of Qwen3-Embedding and Qwen3-Reranker. What tells them
    apart: an embedding model has modules.json or a pooling, or a token behind every text.
    """
    if any(module.kind == "LogitScore" for module in checkpoint.modules):
        return "modules.json reads its score off the next word (LogitScore)"
    if not is_language_model(checkpoint) or checkpoint.has_modules:
        return None
    if checkpoint.rerank_prompt not in (None, "none"):
        return f"--rerank-prompt {checkpoint.rerank_prompt}"
    if checkpoint.model_type not in _OF_MODEL_TYPE or (checkpoint.path / "1_Pooling").is_dir():
        return None
    if (checkpoint.config.get("auto_map") or {}).get("AutoModel") or _appends_a_token(checkpoint):
        return None
    prompt = rerank_prompt_of(checkpoint)
    if prompt is None:
        return None
    return f"it is a bare language model, so a reranker; its prompt is {prompt.name}"


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


def _is_conversion(checkpoint: Checkpoint, prompt: RerankPrompt) -> bool:
    """Whether a sequence classifier was made of such a language model: the same prompt, other weights.

    Nothing in its config.json says so. Its name may, or its weights: they are rows of the word embeddings.
    """
    count = len(checkpoint.label_names)
    if count != 1 and not has_both_words(checkpoint, prompt):
        return False
    # yes and no are nobody else's labels; 0 and 1 are.
    if count == 2 and not str(prompt.true).isdigit():
        return True
    return _is_named_reranker(checkpoint) or is_made_of_words(checkpoint, prompt.true, prompt.false)


def has_both_words(checkpoint: Checkpoint, prompt: RerankPrompt) -> bool:
    """Whether a classifier's two labels are the words of the prompt, the false one first."""
    return checkpoint.label_names == [prompt.false, prompt.true]


def _is_named_reranker(checkpoint: Checkpoint) -> bool:
    parts = checkpoint.path.parts
    # A hub's cache has a model's name two levels over its files.
    own = parts[-3] if len(parts) > 2 and parts[-2] == "snapshots" else parts[-1]
    return any("rerank" in name.lower() for name in (own, str(checkpoint.config.get("_name_or_path", ""))))
