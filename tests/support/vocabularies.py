"""Tokenizers in the published formats, with vocabularies that are made by rule.

Training one with the tokenizers library is not repeatable.
"""

import json
import string
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

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
_MARKS = ["[unused0]", "[unused1]"]
_CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation


def write_wordpiece(path: Path, max_length: int) -> int:
    """A BERT tokenizer whose vocabulary is made by rule: single characters and some words. Gives its size."""
    pieces = [*_SPECIAL, *_MARKS, *_CHARACTERS, *(f"##{c}" for c in _CHARACTERS if c.isalnum()), *_WORDS]
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
    tokenizer.add_special_tokens(_SPECIAL)
    # Published files carry the padding and truncation of their training (all-MiniLM-L6-v2's does).
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "model_max_length": max_length,
            "mask_token": "[MASK]",
        },
    )
    return len(vocabulary)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_unigram(path: Path, max_length: int) -> int:
    """An XLM-RoBERTa tokenizer whose vocabulary is made by rule. Gives its size.

    Without a normaliser: transformers' class drops every one but SentencePiece's own.
    """
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*special, "▁", *_CHARACTERS, *_WORDS, *(f"▁{word}" for word in _WORDS), "<mask>"]
    # Longer pieces are likelier, so that words win over their letters.
    vocabulary = [(p, 0.0 if p in special else len(p) - 12.0) for p in dict.fromkeys(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.add_special_tokens([*special, "<mask>"])
    tokenizer.save(str(path / "tokenizer.json"))
    roles = {
        "bos": "<s>",
        "eos": "</s>",
        "sep": "</s>",
        "cls": "<s>",
        "unk": "<unk>",
        "pad": "<pad>",
        "mask": "<mask>",
    }
    write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "XLMRobertaTokenizer",
            "model_max_length": max_length,
            **{f"{role}_token": token for role, token in roles.items()},
        },
    )
    return len(vocabulary)


STARTOFTEXT = "<|startoftext|>"
ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# Beside the words: what rerankers answer with, and what stands in their prompts.
_PROMPT_WORDS = [
    "yes",
    "no",
    "Yes",
    "No",
    "Instruct",
    "Query",
    "Document",
    "Judge",
    "user",
    "system",
    "query",
]
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_qwen(path: Path, max_length: int, *, has_eos: bool = False, **settings: Any) -> int:
    """Qwen2's and Qwen3's byte-level BPE. Gives its size.

    `has_eos` puts <|endoftext|> behind every text, as Qwen3-Embedding's post-processor does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = _merge(alphabet, [*_WORDS, *(f"Ġ{w}" for w in _WORDS), *_PROMPT_WORDS])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [ENDOFTEXT, IM_START, IM_END, *VISION]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(["<think>", "</think>"])
    byte_level = processors.ByteLevel(trim_offsets=False)
    if has_eos:
        template = processors.TemplateProcessing(
            single=f"$A {ENDOFTEXT}",
            pair=f"$A {ENDOFTEXT} $B {ENDOFTEXT}",
            special_tokens=[(ENDOFTEXT, tokenizer.token_to_id(ENDOFTEXT))],
        )
        tokenizer.post_processor = processors.Sequence([byte_level, template])
    else:
        tokenizer.post_processor = byte_level
    tokenizer.save(str(path / "tokenizer.json"))
    write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": max_length,
            "eos_token": IM_END,
            "pad_token": ENDOFTEXT,
            "bos_token": None,
            "unk_token": None,
            "add_bos_token": False,
            "padding_side": "left",
            **settings,
        },
    )
    return tokenizer.get_vocab_size(with_added_tokens=True)


def write_llama(path: Path, max_length: int, **settings: Any) -> int:
    """The BPE of Mistral and Llama 2: blanks are marked, unknown characters are bytes; <s> before a text, and
    nothing behind it. Gives its size.
    """
    return _write_sentencepiece_bpe(
        path,
        ["<unk>", "<s>", "</s>"],
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        {
            "tokenizer_class": "LlamaTokenizer",
            "model_max_length": max_length,
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "</s>",
            "add_bos_token": True,
            **settings,
        },
    )


def write_gemma(path: Path, max_length: int, **settings: Any) -> int:
    """Gemma's BPE: as Llama's, but no blank is put before a text. Gives its size."""
    return _write_sentencepiece_bpe(
        path,
        ["<pad>", "<eos>", "<bos>", "<unk>"],
        normalizers.Replace(" ", "▁"),
        {
            "tokenizer_class": "GemmaTokenizer",
            "model_max_length": max_length,
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "add_bos_token": True,
            "add_eos_token": False,
            **settings,
        },
    )


def _write_sentencepiece_bpe(
    path: Path, special: list[str], normalizer: normalizers.Normalizer, config: dict[str, Any]
) -> int:
    own = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n"]
    alphabet = list(dict.fromkeys([*own, *_CHARACTERS, *string.ascii_uppercase]))
    vocabulary, merges = _merge(alphabet, [*_WORDS, *(f"▁{w}" for w in _WORDS), *_PROMPT_WORDS])
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bos = config["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocabulary[bos])]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", config)
    return tokenizer.get_vocab_size(with_added_tokens=True)


def _merge(alphabet: list[str], words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A BPE vocabulary in which every word is one token, put together letter by letter."""
    pieces, merges = list(alphabet), []
    for word in words:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
                pieces.append(word[:end])
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges


_CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_clip(path: Path, max_length: int = 77) -> int:
    """CLIP's byte-level BPE, whose words end with </w>. Gives its size; the last two tokens are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    merges = []
    for word in _WORDS:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        for end in range(1, len(letters)):
            pair = "".join(letters[:end]), letters[end]
            if pair not in merges:
                merges.append(pair)
                pieces.append("".join(pair))
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, STARTOFTEXT, ENDOFTEXT]))}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=ENDOFTEXT, end_of_word_suffix="</w>", fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (ENDOFTEXT, vocabulary[ENDOFTEXT]),
        (STARTOFTEXT, vocabulary[STARTOFTEXT]),
        trim_offsets=False,
        add_prefix_space=False,
    )
    tokenizer.add_special_tokens([STARTOFTEXT, ENDOFTEXT])
    tokenizer.save(str(path / "tokenizer.json"))
    write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": max_length,
            "do_lower_case": True,
            "bos_token": STARTOFTEXT,
            "eos_token": ENDOFTEXT,
            "pad_token": ENDOFTEXT,
            "unk_token": ENDOFTEXT,
        },
    )
    return len(vocabulary)
