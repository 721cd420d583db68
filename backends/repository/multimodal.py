"""What a model of texts and images adds to its pipeline: the image stage, tensors, facts, and checks of
options.
"""

from __future__ import annotations

from dataclasses import replace

from backends.chat_prompt import CHAT_PROMPTS
from backends.checkpoint import Checkpoint
from backends.contract import (
    GRID,
    IMAGE,
    IMAGE_GRID,
    IMAGE_TIMES,
    PATCHES,
    PipelineParameter,
    StageSpec,
    TensorSpec,
)
from backends.errors import OptionError
from backends.families.base import Family
from backends.options import ServingOptions
from backends.tokenization import TextTokenizer

_TIMES = TensorSpec(IMAGE_TIMES, "INT64", (2,))


def image_facts(checkpoint: Checkpoint, options: ServingOptions, family: Family) -> dict[str, str]:
    """What the pipeline tells its clients of images, by PipelineParameter; nothing of a model of texts."""
    vision = family.vision
    if vision is None:
        return {}
    most = vision.processor(checkpoint, options).max_image_tokens
    facts: dict[str, str] = {
        PipelineParameter.MODALITIES: "text,image",
        PipelineParameter.MAX_IMAGE_TOKENS: str(most),
    }
    if not vision.tokens(checkpoint.config).is_item:
        facts[PipelineParameter.FUSES] = "true"
    chat = options.chat_template or vision.chat_prompt
    if chat is not None:
        facts[PipelineParameter.CHAT_TEMPLATE] = chat
    return facts


def check_image_options(checkpoint: Checkpoint, options: ServingOptions, family: Family) -> None:
    """Raises OptionError for options about images of a model of texts."""
    given = {
        "--chat-template": options.chat_template,
        "--min-image-tokens": options.min_image_tokens,
        "--max-image-tokens": options.max_image_tokens,
        "--image-positions": None if options.image_positions == "mrope" else options.image_positions,
    }
    has_chat = family.vision is not None and family.vision.chat_prompt is not None
    for name, value in given.items():
        if value is not None and not has_chat:
            raise OptionError(
                f"{name} {value} is for models whose texts and images stand in one prompt (Qwen2-VL and its "
                f"like), and {checkpoint.path} is a {family.name} model; leave it out"
            )


def check_room_for_images(checkpoint: Checkpoint, options: ServingOptions, family: Family) -> None:
    """Raises OptionError for a limit that no image fits in."""
    name = None if family.vision is None else options.chat_template or family.vision.chat_prompt
    if family.vision is None or name is None or options.max_length is None:
        return
    chat, tokens = CHAT_PROMPTS[name], family.vision.tokens(checkpoint.config)
    tokenizer = TextTokenizer(checkpoint, family.max_length(checkpoint), chat=chat)
    prompt = len(tokenizer.prompt_ids(chat.opening(None))) + len(tokenizer.suffix)
    least = family.vision.processor(checkpoint, options).min_image_tokens
    needed = prompt + len(tokens.before) + least + len(tokens.behind)
    if needed > options.max_length:
        raise OptionError(
            f"max_length is {options.max_length}; an image takes {needed} tokens at least with the prompt "
            "around it (--min-image-tokens makes them fewer)"
        )


def chat_notes(checkpoint: Checkpoint, options: ServingOptions, family: Family) -> tuple[str, ...]:
    """Of a language model of images that nobody has called by the name of an embedding model."""
    vision = family.vision
    if vision is None or vision.chat_prompt is None or options.chat_template is not None:
        return ()
    if vision.is_told(checkpoint):
        return ()
    return (
        f"it does not say how it was trained: its prompt is {vision.chat_prompt} and its images have the "
        "size that its own files say; --chat-template says which prompt it has, and with gme-qwen2-vl its "
        "images have GME's size",
    )


def seen_tensors(checkpoint: Checkpoint, options: ServingOptions, family: Family) -> tuple[TensorSpec, ...]:
    """What the encoder reads of images; nothing of a model of texts."""
    if family.vision is None:
        return ()
    processor = family.vision.processor(checkpoint, options)
    return (
        TensorSpec(PATCHES, "UINT8", (-1, 3 * processor.patch_size**2), True),
        TensorSpec(GRID, "INT32", (-1, 3), True),
    )


def image_stage(reference: str, options: ServingOptions, seen: tuple[TensorSpec, ...]) -> StageSpec:
    """The entry that reads image files."""
    patches = next(spec for spec in seen if spec.name == PATCHES)
    return StageSpec(
        stage="image",
        stage_class="backends.stages.image.ImageStage",
        inputs=(TensorSpec(IMAGE, "STRING", (-1,), True),),
        outputs=(replace(patches, is_ragged=False), TensorSpec(IMAGE_GRID, "INT32", (-1, 3)), _TIMES),
        parameters={"checkpoint": reference, **options.to_parameters()},
    )
