"""A pipeline without a server: tokenizer, encoder and head called one after the other."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from backends.chat_prompt import CHAT_PROMPTS
from backends.checkpoint import Checkpoint
from backends.content_tokens import ContentTokenizer
from backends.contract import (
    DENSE,
    INPUT_IDS,
    LOGITS,
    PROMPT_LENGTH,
    SPARSE_INDICES,
    SPARSE_WEIGHTS,
    TOKEN_VECTORS,
)
from backends.encode import encode
from backends.encode_images import choose_image_encoder
from backends.families import family_of
from backends.forward import Forward
from backends.heads import HEADS, only_row
from backends.instruction import instruction_template
from backends.last_token import token_rows
from backends.late_interaction import late_interaction_of
from backends.options import ServingOptions
from backends.prompted_pairs import PromptedPairs
from backends.ragged import Ragged
from backends.rerank_prompt import rerank_prompt_of
from backends.self_check import choose_forward
from backends.template_pairs import TemplatePairs
from backends.tokenization import TextTokenizer, Tokens
from backends.tokenizer_settings import TokenizerSettings
from backends.vision import Images

CPU = torch.device("cpu")


def load_forward(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, *, shares_prefixes: bool = False
) -> Forward:
    family = family_of(checkpoint)
    return choose_forward(
        lambda attention: family.load(checkpoint, attention, dtype, CPU),
        family,
        dict(checkpoint.config),
        "test",
        shares_prefixes=shares_prefixes,
    )


def run(
    path: Path,
    head: str,
    texts: list[str],
    parameters: dict[str, Any] | None = None,
    max_batch_tokens: int = 16384,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """What a head makes of texts, by the same code that the stages run."""
    given = parameters or {}
    checkpoint = Checkpoint.read(path)
    late = late_interaction_of(checkpoint)
    if head != "colbert":
        late = None
    family = family_of(checkpoint)
    tokenizer = TextTokenizer(
        checkpoint,
        family.max_length(checkpoint),
        late,
        family.most_tokens(checkpoint),
        family.last_token(checkpoint.config),
    )
    instruction = instruction_template(checkpoint, family.instruction)
    settings = TokenizerSettings.read(given, checkpoint, "right", late, instruction)
    rows = tokenizer.encode([text.encode() for text in texts], settings)
    ids = Ragged.pack([torch.from_numpy(row.ids.astype(np.int64)) for row in rows])
    keys = np.array([len(row.ids) - row.n_blind for row in rows])
    with torch.inference_mode():
        hidden = encode(load_forward(checkpoint, dtype), ids, max_batch_tokens, torch.float32, keys)
        spec = HEADS[head]
        wanted = spec.inputs(checkpoint)
        known = {
            PROMPT_LENGTH: torch.tensor([row.prompt_length for row in rows]),
            INPUT_IDS: ids.values,
        }
        loaded = spec.load(checkpoint, CPU, torch.float32)
        chosen = {name: value for name, value in given.items() if name in spec.parameters}
        loaded.check(chosen)
        return loaded(Ragged(hidden, ids.lengths), {name: known[name] for name in wanted}, chosen)


def embed_contents(
    path: Path,
    items: list[tuple[str, list[Any]]],
    parameters: dict[str, Any] | None = None,
    max_batch_tokens: int = 16384,
    **options: Any,
) -> np.ndarray:
    """Dense embeddings [n, d] of texts and pictures, by the same code that the stages run."""
    given = ServingOptions(**options)
    checkpoint = Checkpoint.read(path)
    family = family_of(checkpoint)
    assert family.vision is not None
    tokens = family.vision.tokens(checkpoint.config)
    name = given.chat_template or family.vision.chat_prompt
    chat = CHAT_PROMPTS[name] if name else None
    tokenizer = TextTokenizer(checkpoint, family.max_length(checkpoint), chat=chat)
    settings = TokenizerSettings.read(parameters or {}, checkpoint, "right", chat=chat)
    processor = family.vision.processor(checkpoint, given)
    seen = [[processor(image) for image in images] for _, images in items]
    grids = np.zeros((len(items), max(map(len, seen)) or 1, 3), np.int32)
    for i, row in enumerate(seen):
        for j, (_, grid) in enumerate(row):
            grids[i, j] = grid
    has_images = any(map(len, seen))
    rows = ContentTokenizer(tokenizer, tokens, chat).encode(
        [text.encode() for text, _ in items], grids if has_images else None, settings
    )
    ids = Ragged.pack([torch.from_numpy(row.ids.astype(np.int64)) for row in rows])
    patches = [patch for row in seen for patch, _ in row]
    images = Images(
        torch.from_numpy(np.concatenate([np.empty((0, 3 * processor.patch_size**2), np.uint8), *patches])),
        grids[grids[:, :, 0] > 0].astype(np.int64),
    )
    forward = load_forward(checkpoint, shares_prefixes=family.is_decoder)
    encoder = choose_image_encoder(forward, family.vision, checkpoint, given, max_batch_tokens)
    places = token_rows("last", ids, checkpoint)
    with torch.inference_mode():
        hidden = encoder(ids, images, torch.float32, places)
        head = HEADS["dense"].load(checkpoint, CPU, torch.float32)
        return head(Ragged(hidden, np.ones(len(items), np.int64)), {}, {})[DENSE].numpy()


def logits(
    path: Path, items: list[Any], parameters: dict[str, Any] | None = None, max_batch_tokens: int = 16384
) -> np.ndarray:
    """Logits [n, labels] of texts, or of pairs of texts."""
    checkpoint = Checkpoint.read(path)
    family = family_of(checkpoint)
    rows = tokenize_for_logits(checkpoint, items, parameters)
    ids = Ragged.pack([torch.from_numpy(row.ids.astype(np.int64)) for row in rows])
    firsts = None
    if family.tells_pairs_apart(checkpoint.config):
        firsts = np.array([row.first_length for row in rows])
    row = only_row(checkpoint, ["logits"])
    places = None if row is None else token_rows(row, ids, checkpoint)
    lengths = ids.lengths if places is None else np.ones(len(rows), np.int64)
    with torch.inference_mode():
        hidden = encode(load_forward(checkpoint), ids, max_batch_tokens, torch.float32, None, firsts, places)
        head = HEADS["logits"].load(checkpoint, CPU, torch.float32)
        return head(Ragged(hidden, lengths), {}, {})[LOGITS].numpy()


def tokenize_for_logits(
    checkpoint: Checkpoint, items: list[Any], parameters: dict[str, Any] | None = None
) -> list[Tokens]:
    """Tokens of texts, or of pairs of texts in the checkpoint's prompt if it has one."""
    family = family_of(checkpoint)
    tokenizer = TextTokenizer(
        checkpoint, family.max_length(checkpoint), last_token=family.last_token(checkpoint.config)
    )
    settings = TokenizerSettings.read(parameters or {}, checkpoint, "right")
    if isinstance(items[0], str):
        return tokenizer.encode([text.encode() for text in items], settings)
    pairs = [(a.encode(), b.encode()) for a, b in items]
    prompt = rerank_prompt_of(checkpoint)
    if prompt is not None:
        return PromptedPairs(tokenizer, prompt).encode(pairs, settings)
    return TemplatePairs(tokenizer).encode(pairs, settings)


def embed(
    path: Path, texts: list[str], parameters: dict[str, Any] | None = None, **options: Any
) -> np.ndarray:
    """Dense embeddings [n, d] of texts."""
    return run(path, "dense", texts, parameters, **options)[DENSE].numpy()


def sparse(path: Path, texts: list[str], parameters: dict[str, Any] | None = None) -> list[dict[int, float]]:
    """{token id: weight} of each text."""
    answer = run(path, "sparse", texts, parameters)
    pairs = zip(answer[SPARSE_INDICES].split(), answer[SPARSE_WEIGHTS].split(), strict=True)
    return [dict(zip(i.tolist(), w.tolist(), strict=True)) for i, w in pairs]


def colbert(path: Path, texts: list[str], parameters: dict[str, Any] | None = None) -> list[np.ndarray]:
    """Vectors [v, d] of the tokens of each text."""
    return [v.numpy() for v in run(path, "colbert", texts, parameters)[TOKEN_VECTORS].split()]


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n] cosines of the rows of two matrices."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
