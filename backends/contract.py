"""Everything that the gateway, the stages and a direct tritonclient user may say to each other.

Shape letters: n items of one request, t packed tokens, h hidden size, d output size, m images of one request,
k images of one item, p packed patches. One client request is one batch element of the encoder and the heads,
so nothing on the wire is ever padded:

    text [n, k] -> tokenizer -> input_ids [1, t], length [1, n] -> encoder -> hidden [1, t, h] -> heads:
        dense               [n, d]
        sparse              sparse_indices [1, k], sparse_weights [1, k], sparse_count [n, 1]
        colbert             token_vectors [1, v, d], vector_count [n, 1]
        logits              logits [n, labels]
        tokens              token_embeddings [1, t, h], token_ids [1, t]

Where all heads of a pipeline read one token of each text only, the encoder gives last_hidden [1, n, h]
instead of hidden. Where the heads are fused into the encoder (ServingOptions.fuse_heads), it gives their
outputs instead, and no entries of heads are there.

A model of texts and images has a second ensemble, `multimodal_name`, over the same entries. An item is then a
text, images, or both; of what it lacks its element is empty:

    image [n, k] -> image stage -> patches [1, p, c], image_grid [n, k, 3]
    text [n, 1], image_grid -> tokenizer -> input_ids [1, t], length [1, n], grid [1, m, 3]
    input_ids, length, patches, grid -> encoder

The encoder reads `patches` and `grid` of every request, so that texts and images share its batches: of a
request for the first ensemble, which has no image stage, the tokenizer gives them, and they are empty.

Answers of different length per item lie end to end in one row, beside the count of each item.

`image_times`, `tokenizer_times` [1, 2] and `encoder_times` [1, 3] say when the stage had the request in its
hands, in microseconds of the clock that all processes of the machine share (CLOCK_MONOTONIC).

`n_tokens` and `truncated` ([n, 1]) repeat what the tokenizer knows under names that no later step reads: the
server (2.51) refuses a request for some outputs of an ensemble when one of them also feeds a step.

The tokenizer's entry tells more to who calls it directly, past the ensemble: `token_texts` [1, t],
`token_spans` [1, t, 2], `is_special` [1, t] and `decoded` [n, 1].
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

TEXT = "text"
IMAGE = "image"
"""Encoded image files [n, k], as they lie on a disk; empty where an item has no image, or fewer."""
PATCHES = "patches"
"""uint8 [1, p, c]: the patches of all images end to end, each the red, green and blue values of a square."""
IMAGE_GRID = "image_grid"
"""int32 [n, k, 3]: patches of each image along time, height and width; zeros where there is none."""
GRID = "grid"
"""int32 [1, m, 3]: the same of the images that are there, in the order of the items."""
INPUT_IDS = "input_ids"
LENGTH = "length"
LAST_HIDDEN = "last_hidden"
"""[1, n, h] instead of hidden: the state of one token of each text, where no head reads another."""
PROMPT_LENGTH = "prompt_length"
FIRST_LENGTH = "first_length"
"""How many of a sequence's tokens belong to the first text of a pair; all of them where there is no
second.
"""
KEY_LENGTH = "key_length"
"""How many of a sequence's tokens the others look at: those behind them (a query's expansion) only look."""
N_TOKENS = "n_tokens"
TRUNCATED = "truncated"
HIDDEN = "hidden"
DENSE = "dense"
SPARSE_INDICES = "sparse_indices"
SPARSE_WEIGHTS = "sparse_weights"
SPARSE_COUNT = "sparse_count"
TOKEN_VECTORS = "token_vectors"
VECTOR_COUNT = "vector_count"
TOKEN_EMBEDDINGS = "token_embeddings"
TOKEN_IDS = "token_ids"
LOGITS = "logits"
TOKEN_TEXTS = "token_texts"
TOKEN_SPANS = "token_spans"
IS_SPECIAL = "is_special"
DECODED = "decoded"
IMAGE_TIMES = "image_times"
"""int64 [1, 2]: when the request's images were begun, and done."""
TOKENIZER_TIMES = "tokenizer_times"
"""int64 [1, 2]: when the request's texts were begun, and done."""
ENCODER_TIMES = "encoder_times"
"""int64 [1, 3]: when the request came in, when its first pass began, and when its last one ended."""

TOKEN_DTYPE = np.dtype("<i4")
"""How a list of token ids travels inside one element of `text` (see RequestParameter.TEXT_FORMAT)."""

MAX_CHARS_PER_TOKEN = 256
"""A text with more characters than this for each token of the limit is over the limit, whatever they are: an
unbroken string of any length can be one token of some vocabularies.
"""


class Task(StrEnum):
    """What a client wants of a model."""

    EMBED = "embed"
    """One vector for each item."""
    SPARSE = "sparse"
    """Weights of some tokens of the vocabulary."""
    COLBERT = "colbert"
    """A vector for each token, for late interaction."""
    TOKENS = "tokens"
    """The encoder's own vector of every token."""
    SCORE = "score"
    """How well a document answers a query."""
    CLASSIFY = "classify"
    """Logits of labels."""


TASK_OUTPUTS: dict[Task, tuple[str, ...]] = {
    Task.EMBED: (DENSE,),
    Task.SPARSE: (SPARSE_INDICES, SPARSE_WEIGHTS, SPARSE_COUNT),
    Task.COLBERT: (TOKEN_VECTORS, VECTOR_COUNT),
    Task.TOKENS: (TOKEN_EMBEDDINGS, TOKEN_IDS),
    Task.SCORE: (LOGITS,),
    Task.CLASSIFY: (LOGITS,),
}
"""The outputs of the pipeline that answer a task; the server computes no head that nobody asked for."""

ACCOUNT_OUTPUTS = (N_TOKENS, TRUNCATED)
"""What every pipeline tells about its input, besides the answer."""

COUNT_OF = {
    SPARSE_INDICES: SPARSE_COUNT,
    SPARSE_WEIGHTS: SPARSE_COUNT,
    TOKEN_VECTORS: VECTOR_COUNT,
    TOKEN_EMBEDDINGS: N_TOKENS,
    TOKEN_IDS: N_TOKENS,
    INPUT_IDS: N_TOKENS,
    TOKEN_TEXTS: N_TOKENS,
    TOKEN_SPANS: N_TOKENS,
    IS_SPECIAL: N_TOKENS,
}
"""Outputs that hold all items end to end, and the output [n, 1] that says how much of it is each item's."""


class RequestParameter(StrEnum):
    """Request parameters that the stages read; all are optional."""

    PROMPT_NAME = "prompt_name"
    """str: one of the checkpoint's own prompts, put before every text."""
    PROMPT = "prompt"
    """str: a literal prompt; wins over a prompt name."""
    INSTRUCTION = "instruction"
    """str: what a query is for; it stands where the model was trained to have it."""
    TRUNCATION = "truncation"
    """For a text over the limit "error", "right" (drop the end) or "left" (drop the beginning). Of a pair the
    longer text is cut first; "document" cuts the second only.
    """
    MAX_TOKENS = "max_tokens"
    """int: of a text or pair no more tokens than that, special tokens included."""
    MAX_QUERY_TOKENS = "max_query_tokens"
    """int: of the first text of a pair no more tokens than that."""
    MAX_DOCUMENT_TOKENS = "max_document_tokens"
    """int: of the second text of a pair no more tokens than that."""
    TEXT_FORMAT = "text_format"
    """"text" (UTF-8, the default) or "ids" (little-endian int32 token ids in each element of `text`)."""
    DIMENSIONS = "dimensions"
    """int: keep this many leading components of `dense`, then normalise if the checkpoint does."""
    NORMALIZE = "normalize"
    """bool: normalise vectors to unit length or not, whatever the checkpoint says."""
    ROLE = "role"
    """"query" or "document": which of the two the texts are, for models that tell them apart."""
    TOP_K = "top_k"
    """int: keep so many of the largest sparse weights of each text."""
    ADD_SPECIAL_TOKENS = "add_special_tokens"
    """bool, of the tokenizer's entry: whether `token_texts` and its like have the model's special tokens."""
    SKIP_SPECIAL_TOKENS = "skip_special_tokens"
    """bool, of the tokenizer's entry: whether `decoded` leaves special tokens out."""
    DEADLINE_MS = "deadline_ms"
    """int, milliseconds since 1970: what has not begun by then is not computed. Where the server runs on
    another machine than who sets it, both need the same clock.
    """
    PING = "ping"
    """bool, of a stage's entry: it answers at once and without outputs, whatever the inputs hold."""


class PipelineParameter(StrEnum):
    """String parameters of a pipeline's ensemble entry: what the gateway tells its clients about a model."""

    TASKS = "tasks"
    FAMILY = "family"
    CHECKPOINT = "checkpoint"
    SERVED_MODEL_NAME = "served_model_name"
    DIMENSIONS = "dimensions"
    MATRYOSHKA_DIMENSIONS = "matryoshka_dimensions"
    """The sizes that an embedding may be cut to, separated by commas, where the checkpoint lists them."""
    MAX_LENGTH = "max_length"
    MAX_BATCH_TOKENS = "max_batch_tokens"
    ROLES = "roles"
    """"true" where queries and documents are encoded differently."""
    INSTRUCTIONS = "instructions"
    """"true" where the model takes an instruction."""
    ROLE_PROMPTS = "role_prompts"
    """"true" where the checkpoint has prompts of its own for queries or documents."""
    POOLING = "pooling"
    LABELS = "labels"
    """JSON list of the labels' names, in the order of the logits."""
    SCORE_ACTIVATION = "score_activation"
    """identity, sigmoid or softmax: what the checkpoint makes of a logit as a score."""
    SCORE_IS_PROBABILITY = "score_is_probability"
    """"true" where the model's makers give a probability, not a logit."""
    LABEL_ACTIVATION = "label_activation"
    """The same for probabilities of labels."""
    MODALITIES = "modalities"
    """text, or text,image where the second ensemble (multimodal_name) is there."""
    FUSES = "fuses"
    """"true" where one item may hold a text and images, or several images."""
    CHAT_TEMPLATE = "chat_template"
    """The name of the prompt around the items of a model of texts and images."""
    MAX_IMAGE_TOKENS = "max_image_tokens"
    """Tokens that one image takes at most."""
    DTYPE = "dtype"
    TRUNCATION = "truncation"
    """What happens to a text over the limit when the request does not say."""


NOT_WELL = "not well: "
"""How the message of an INTERNAL failure begins that answers a ping: the stage takes requests in, but
computes nothing any more, and should be loaded anew.
"""
SHARED_MEMORY_FULL = "shared memory pool"
"""In the server's own words (2.51) where /dev/shm has no room for a tensor."""
TRUNCATIONS = ("error", "right", "left", "document")
ROLES = ("query", "document")


class ErrorCode(StrEnum):
    """Why a request was refused. All but the last three are the client's to mend."""

    INVALID_INPUT = "invalid_input"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    INVALID_TOKEN_ID = "invalid_token_id"
    INVALID_PROMPT = "invalid_prompt"
    UNKNOWN_PROMPT = "unknown_prompt"
    INVALID_INSTRUCTION = "invalid_instruction"
    INVALID_DIMENSIONS = "invalid_dimensions"
    INVALID_TOP_K = "invalid_top_k"
    INVALID_IMAGE = "invalid_image"
    IMAGES_TOO_LONG = "images_too_long"
    """Images take more tokens than there are; unlike a text they are never cut."""
    DEADLINE_EXCEEDED = "deadline_exceeded"
    """Nobody waits for the answer any more."""
    OUT_OF_MEMORY = "out_of_memory"
    """The device has no room for the request at the moment."""
    INTERNAL = "internal"


@dataclass(frozen=True)
class StageFailure:
    """A refusal as it crosses the server, which carries nothing but a status and one string."""

    code: ErrorCode
    message: str
    item: int | None = None
    """Position in `text` of the item that is at fault."""

    def __str__(self) -> str:
        where = "" if self.item is None else f" at item {self.item}"
        return f"{self.code}{where}: {self.message}"

    @classmethod
    def parse(cls, text: str) -> StageFailure | None:
        """The failure inside a server's error text, or None when the text is not one of ours."""
        found = _FAILURE.search(text)
        if found is None:
            return None
        item = found["item"]
        return cls(ErrorCode(found["code"]), found["message"], None if item is None else int(item))


# The server puts "in ensemble 'x', " and the like before the text of a stage.
_FAILURE = re.compile(
    rf"(?:^|, |\] )(?P<code>{'|'.join(ErrorCode)})(?: at item (?P<item>\d+))?: (?P<message>.*)", re.DOTALL
)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an entry, without the batch dimension. -1 stands for a length that varies."""

    name: str
    dtype: str
    """A data type of the server's configuration, without its TYPE_ prefix: STRING, INT32, FP32, BF16,
    BOOL.
    """
    dims: tuple[int, ...]
    is_ragged: bool = False
    """Inputs only: requests of different lengths may share a batch."""
    is_optional: bool = False
    """Inputs only: it may be absent. Requests with and without it do not share a batch."""


@dataclass(frozen=True)
class StageSpec:
    """One Python-backend entry of the model repository."""

    stage: str
    """The stage's short name, which ends the entry's name: tokenizer, encoder, dense."""
    stage_class: str
    """Dotted path of the class in backends.stages that the entry's model.py names."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto: a GPU where the server sees one, else the CPU."""
    instances: int = 1


@dataclass(frozen=True)
class PipelineSpec:
    """All entries of one checkpoint: its stages in order, and the ensemble that chains them by tensor
    names.
    """

    name: str
    max_batch_size: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    stages: tuple[StageSpec, ...]
    image_stage: StageSpec | None = None
    """Of a model of texts and images: the first step of its second ensemble, before all others."""
    parameters: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What had to be guessed of the checkpoint, for the person who serves it."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why it has each of its heads, by the head's name."""
    generation: int = 1
    """Of its entries; see entry_name."""


def entry_name(pipeline: str, stage: str, generation: int = 1) -> str:
    """Name of a stage's entry in the model repository. A model that is replaced while it serves gets entries
    of the next generation beside those of the old one.
    """
    return f"{pipeline}.{stage}" if generation == 1 else f"{pipeline}.{stage}.{generation}"


def stage_of(pipeline: str, entry: str) -> str:
    """The stage's short name in the name of its entry, of whatever generation."""
    return _GENERATION.sub("", entry.removeprefix(f"{pipeline}."))


def generation_of(entry: str) -> int:
    """Which generation an entry of a stage is of."""
    found = _GENERATION.search(entry)
    return int(found[1]) if found else 1


# Names of stages have no digits at their end, and none but a generation is a number.
_GENERATION = re.compile(r"(?<=[a-z])\.(\d+)$")


def multimodal_name(pipeline: str) -> str:
    """Name of the ensemble that takes images beside texts, with the same outputs as the pipeline's own."""
    return f"{pipeline}.multimodal"
