"""A checkpoint's tokenizer.json: reading it, and what its special tokens are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer
from tokenizers.normalizers import Lowercase, Normalizer
from tokenizers.normalizers import Sequence as NormalizerSequence

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError
from backends.json_file import read_json
from backends.late_interaction import Expansion

TokenIds = npt.NDArray[np.int32]


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    file = checkpoint.transformer_path / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing more exact
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    else:
        # Imported here: it takes a second, and nearly every checkpoint has the file.
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.transformer_path, local_files_only=True
        ).backend_tokenizer
    # Some published files carry the padding and truncation of their training.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if checkpoint.lowercases and not (tokenizer.normalizer and _has_lowercase(_state(tokenizer.normalizer))):
        rest = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
        tokenizer.normalizer = NormalizerSequence([Lowercase(), *rest])
    return tokenizer


def keep_whole(tokenizer: Tokenizer, marks: Sequence[str]) -> None:
    """Makes marks of the vocabulary, such as [unused0], one token each, past any normaliser.

    *Source:* sentence-transformers 6.2: the mark with its blank, or its first word, if the vocabulary has it.
    """
    for mark in marks:
        known = next((m for m in (mark, *mark.split()[:1]) if tokenizer.token_to_id(m) is not None), None)
        if known is not None and tokenizer.encode(known, add_special_tokens=False).tokens != [known]:
            tokenizer.add_special_tokens([AddedToken(known, normalized=False, special=True)])


def expansion_id(tokenizer: Tokenizer, checkpoint: Checkpoint, expansion: Expansion) -> int:
    """*Source:* sentence-transformers 6.2: the mask token, else the end of sequence."""
    config = checkpoint.tokenizer_config
    named = (
        [expansion.token]
        if expansion.token
        else [_content(config.get(n)) for n in ("mask_token", "eos_token")]
    )
    for token in [*named, "[MASK]", "<mask>"]:
        found = tokenizer.token_to_id(token) if token else None
        if found is not None:
            return found
    raise CheckpointError(
        f"{checkpoint.transformer_path}: queries are expanded, but the tokenizer has no "
        f"{expansion.token or 'mask token'}"
    )


def token_ids_of(checkpoint: Checkpoint, words: Sequence[str]) -> list[int]:
    """Ids of the words that are one token of the vocabulary each; others are left out."""
    if not words:
        return []
    tokenizer = load_tokenizer(checkpoint)
    found = (tokenizer.token_to_id(word) for word in words)
    return sorted({token for token in found if token is not None})


def word_text(checkpoint: Checkpoint, word: str | int) -> str:
    """The text of a token that is given by its text or by its id."""
    if isinstance(word, str):
        return word
    return load_tokenizer(checkpoint).decode([word], skip_special_tokens=False).strip() or str(word)


# Where tokenizer_config.json does not name a special token, the tokenizer's class in transformers does.
_CLASS_DEFAULTS = {
    "cls_token": ("[CLS]", "<s>"),
    "eos_token": ("</s>",),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
}


def special_token_ids(checkpoint: Checkpoint, names: Sequence[str]) -> list[int]:
    """Ids of special tokens by their names in tokenizer_config.json, such as cls_token."""
    tokenizer = load_tokenizer(checkpoint)
    others = read_json(checkpoint.transformer_path / "special_tokens_map.json")
    found = set()
    for name in names:
        own = _content(checkpoint.tokenizer_config.get(name)) or _content(others.get(name))
        for token in (own,) if own else _CLASS_DEFAULTS.get(name, ()):
            known = tokenizer.token_to_id(token)
            if known is not None:
                found.add(known)
                break
    return sorted(found)


def _content(token: Any) -> str | None:
    """tokenizer_config.json holds a token as a string, or as an object with its content."""
    return token.get("content") if isinstance(token, dict) else token


def _state(normalizer: Normalizer) -> dict[str, Any]:
    """A normaliser as it stands in tokenizer.json."""
    state: dict[str, Any] = json.loads(normalizer.__getstate__())
    return state


def _has_lowercase(state: Mapping[str, Any]) -> bool:
    inner = state.get("normalizers", [])
    return state.get("type") == "Lowercase" or bool(state.get("lowercase")) or any(map(_has_lowercase, inner))


def special_tokens(
    tokenizer: Tokenizer, checkpoint: Checkpoint, last_token: str | None = None
) -> tuple[TokenIds, TokenIds]:
    """What stands before and behind a text; `last_token` belongs behind it whatever the files say.

    The post-processor of tokenizer.json says so, but not always the whole of it: add_bos_token and
    add_eos_token of tokenizer_config.json count too (E5-Mistral and gte-Qwen2 lose their last token
    otherwise), and a BERT tokenizer without a post-processor has [CLS] and [SEP] all the same. *Source:*
    transformers 5.23's BertTokenizer.
    """
    prefix, suffix = _template_tokens(tokenizer, checkpoint)
    config = checkpoint.tokenizer_config

    def id_of(name: str) -> int | None:
        token = _content(config.get(name))
        return tokenizer.token_to_id(token) if token else None

    first, last = id_of("bos_token"), id_of("eos_token")
    if last_token is not None:
        last = tokenizer.token_to_id(last_token)
        if last is None:
            raise CheckpointError(
                f"{checkpoint.transformer_path}: {last_token} belongs behind every text of this model, but "
                "its tokenizer does not have it"
            )
    if config.get("add_bos_token") and first is not None and prefix[:1] != [first]:
        prefix = [first, *prefix]
    if (config.get("add_eos_token") or last_token) and last is not None and suffix[-1:] != [last]:
        suffix = [*suffix, last]
    if not prefix and not suffix and tokenizer.post_processor is None and _is_wordpiece(tokenizer):
        cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
        if cls is not None and sep is not None:
            prefix, suffix = [cls], [sep]
    return np.array(prefix, np.int32), np.array(suffix, np.int32)


@dataclass(frozen=True)
class PairTemplate:
    """What stands around and between the two texts of a pair."""

    before: TokenIds
    between: TokenIds
    behind: TokenIds
    n_between_first: int
    """Tokens of `between` that have the type of the first text."""
    has_types: bool
    """Whether the second text has a type of its own."""

    @property
    def count(self) -> int:
        """Special tokens in all."""
        return len(self.before) + len(self.between) + len(self.behind)

    def join(self, first: TokenIds, second: TokenIds) -> tuple[TokenIds, int]:
        """The whole sequence, and how many of its last tokens have the type of the second text."""
        n_second = len(self.between) - self.n_between_first + len(second) + len(self.behind)
        n_second = n_second if self.has_types else 0
        return np.concatenate([self.before, first, self.between, second, self.behind]), n_second


def pair_template(
    tokenizer: Tokenizer, checkpoint: Checkpoint, prefix: TokenIds, suffix: TokenIds
) -> PairTemplate | None:
    """The post-processor's template of a pair, as it puts it around a probe; None where it has none.

    A BERT tokenizer without a post-processor has [CLS] A [SEP] B [SEP] all the same; another one puts the
    texts end to end.
    """
    names = checkpoint.tokenizer_config.get("model_input_names")
    is_told = not isinstance(names, list) or "token_type_ids" in names
    if tokenizer.post_processor is None and len(prefix) == len(suffix) == 1:
        return PairTemplate(prefix, suffix, suffix, 1, is_told)
    probes = "a", "b"
    first, second = (tokenizer.encode(probe, add_special_tokens=False).ids for probe in probes)
    whole = tokenizer.encode(*probes, add_special_tokens=True)
    start = _find(whole.ids, first, 0)
    place = -1 if start < 0 else _find(whole.ids, second, start + len(first))
    if start < 0 or place < 0:
        return None
    end = start + len(first)
    parts = whole.ids[:start], whole.ids[end:place], whole.ids[place + len(second) :]
    before, between, behind = (np.array(part, np.int32) for part in parts)
    n_between_first = sum(kind == 0 for kind in whole.type_ids[end:place])
    has_types = is_told and whole.type_ids[place] == 1
    return PairTemplate(before, between, behind, n_between_first, has_types)


def _find(ids: list[int], part: list[int], start: int) -> int:
    """Where `part` begins in `ids`, from `start` on; -1 where it is not."""
    places = range(start, len(ids) - len(part) + 1)
    return next((i for i in places if part and ids[i : i + len(part)] == part), -1)


def _is_wordpiece(tokenizer: Tokenizer) -> bool:
    return type(tokenizer.model).__name__ == "WordPiece"


def _template_tokens(tokenizer: Tokenizer, checkpoint: Checkpoint) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and behind a text."""
    probe = "a"
    bare = tokenizer.encode(probe, add_special_tokens=False).ids
    whole = tokenizer.encode(probe, add_special_tokens=True).ids
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise CheckpointError(
        f"{checkpoint.transformer_path}/tokenizer.json: its post-processor changes the text's own tokens, "
        f"which is not served ({json.dumps(bare)} became {json.dumps(whole)})"
    )
