"""Tiny random models of texts and images, in the published layouts, and pictures to show them."""

import io
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer

from tests.support.checkpoints import randomize
from tests.support.vocabularies import IM_END, VISION, write_clip, write_json, write_qwen

IMAGE_SIZE, PATCH = 24, 8
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip(
    path: Path,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    projection_dim: int = 20,
    **settings: Any,
) -> Path:
    """openai/clip-vit-large-patch14-336, whose preprocessor_config.json has whole numbers for sizes.

    `settings` are of both models, `text` and `vision` of one.
    """
    path.mkdir(parents=True, exist_ok=True)
    size = write_clip(path)
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    given = {"hidden_act": "quick_gelu", **settings}
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": size,
            "hidden_size": 32,
            "bos_token_id": size - 2,
            "eos_token_id": size - 1,
            "pad_token_id": 1,
            **shape,
            **given,
            **(text or {}),
        },
        vision_config={
            "hidden_size": 48,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            **shape,
            **given,
            **(vision or {}),
        },
        projection_dim=projection_dim,
    )
    side = config.vision_config.image_size
    randomize(transformers.CLIPModel(config)).save_pretrained(path)
    write_json(
        path / "preprocessor_config.json",
        {
            "crop_size": side,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": _CLIP_MEAN,
            "image_std": _CLIP_STD,
            "resample": 3,
            "size": side,
        },
    )
    return path


def clip_of_sentence_transformers(path: Path, **settings: Any) -> Path:
    """sentence-transformers/clip-ViT-B-32: one module, in a folder of its own, and nothing behind it."""
    clip(path / "0_CLIPModel", **settings)
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    write_json(path / "modules.json", [module])
    return path


_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 4096,
}


def _qwen(path: Path, kind: str, text: dict[str, Any], vision: dict[str, Any], **processor: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    size = write_qwen(path, 4096)
    start, end, image, video = (
        Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id(token) for token in VISION
    )
    config = getattr(transformers, f"{kind}Config")(
        text_config={"vocab_size": size, **_TEXT, **text},
        vision_config={"in_channels": 3, **vision},
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=True,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    randomize(model).save_pretrained(path)
    write_json(
        path / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": _CLIP_MEAN,
            "image_std": _CLIP_STD,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            **processor,
        },
    )
    return path


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def qwen2_vl(path: Path, **text: Any) -> Path:
    """A Qwen2-VL as transformers saves it."""
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return _qwen(path, "Qwen2VL", {"rope_parameters": _MROPE, **text}, vision)


def gme(path: Path, **text: Any) -> Path:
    """Alibaba-NLP/gme-Qwen2-VL-2B-Instruct: the language model's configuration lies open, code comes with
    it.
    """
    qwen2_vl(path, **text)
    config = json.loads((path / "config.json").read_text())
    nested = config.pop("text_config")
    nested.pop("model_type", None)
    rope = nested.pop("rope_parameters")
    flat = {
        **nested,
        **config,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "auto_map": {"AutoModel": "modeling_gme_qwen2vl.GmeQwen2VL"},
    }
    write_json(path / "config.json", flat)
    (path / "modeling_gme_qwen2vl.py").write_text("raise SystemExit('this must not run')")
    write_json(
        path / "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": "custom_st.MultiModalTransformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
    )
    write_json(
        path / "1_Pooling" / "config.json",
        {"word_embedding_dimension": 32, "pooling_mode_lasttoken": True, "include_prompt": True},
    )
    return path


def qwen2_5_vl(path: Path, **text: Any) -> Path:
    """A Qwen2.5-VL: most layers of its model of images look at windows."""
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    return _qwen(path, "Qwen2_5_VL", {"rope_parameters": _MROPE, **text}, vision)


def qwen3_vl(path: Path, **text: Any) -> Path:
    """Qwen/Qwen3-VL-Embedding: states of images behind two layers, patches of 16 pixels."""
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
        "patch_size": 16,
    }
    rope = {**_MROPE, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    pixels = {"min_pixels": 4096, "max_pixels": 1310720, "patch_size": 16}
    return _qwen(path, "Qwen3VL", {"rope_parameters": rope, "head_dim": 16, **text}, vision, **pixels)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over a slope, so that every way of resizing shows."""
    generator = np.random.default_rng(seed)
    slope = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 55, height)[:, None, None]
    noise = generator.integers(-60, 60, (height, width, 3))
    return Image.fromarray(np.clip(slope + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A file of it."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def bomb(side: int) -> bytes:
    """A PNG that says in a few bytes that it has so many pixels on each side."""
    whole = encoded(Image.new("L", (1, 1)))
    head = b"IHDR" + struct.pack(">II", side, side) + whole[24:29]
    return whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:]


GME_PROMPT = (
    "<|im_start|>system\n{}"
    + IM_END
    + "\n<|im_start|>user\n{}"
    + IM_END
    + "\n<|im_start|>assistant\n<|endoftext|>"
)


class QwenReference:
    """transformers' own model and processors, one item at a time."""

    def __init__(
        self, path: Path, prompt: str = GME_PROMPT, *, is_plain: bool = False, **pixels: int
    ) -> None:
        """`pixels` are bounds of the processor; `is_plain` gives images positions as words have them."""
        self.model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        own = json.loads((path / "preprocessor_config.json").read_text())
        self.processor = transformers.Qwen2VLImageProcessorPil(**{**own, **pixels})
        self.prompt = prompt
        self.is_plain = is_plain

    def __call__(
        self,
        items: Sequence[tuple[str, Sequence[Image.Image]]],
        instruction: str = "You are a helpful assistant.",
    ) -> np.ndarray:
        """Unit vectors [n, h]."""
        return np.stack([self._embed(text, images, instruction) for text, images in items])

    def _embed(self, text: str, images: Sequence[Image.Image], instruction: str) -> np.ndarray:
        pixels = self.processor(list(images), return_tensors="pt") if images else {}
        content = ""
        for grid in pixels.get("image_grid_thw", ()):
            pads = "<|image_pad|>" * (int(grid.prod()) // self.processor.merge_size**2)
            content += f"<|vision_start|>{pads}<|vision_end|>"
        ids = self.tokenizer(
            self.prompt.format(instruction, content + text), add_special_tokens=False, return_tensors="pt"
        ).input_ids
        with torch.inference_mode():
            if self.is_plain:
                hidden = self._plain(ids, pixels)
            else:
                types = (ids == self.model.config.image_token_id).int()
                hidden = self.model(input_ids=ids, mm_token_type_ids=types, **pixels).last_hidden_state
            return torch.nn.functional.normalize(hidden[0, -1], dim=0).numpy()

    def _plain(self, ids: torch.Tensor, pixels: Any) -> torch.Tensor:
        embedded = self.model.get_input_embeddings()(ids)
        if pixels:
            states = torch.cat(list(self.model.get_image_features(**pixels).pooler_output))
            embedded[ids == self.model.config.image_token_id] = states
        return self.model.language_model(inputs_embeds=embedded).last_hidden_state


class ClipReference:
    """transformers' own model and processors, one item at a time."""

    def __init__(self, path: Path) -> None:
        self.model = transformers.CLIPModel.from_pretrained(path).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        config = json.loads((path / "preprocessor_config.json").read_text())
        self.processor = transformers.CLIPImageProcessorPil(**config)

    def __call__(
        self, items: Sequence[tuple[str, Sequence[Image.Image]]], *, normalizes: bool = True
    ) -> np.ndarray:
        """Vectors [n, d]."""
        with torch.inference_mode():
            found = torch.cat([self._embed(text, images) for text, images in items])
        return (torch.nn.functional.normalize(found) if normalizes else found).numpy()

    def _embed(self, text: str, images: Sequence[Image.Image]) -> torch.Tensor:
        if images:
            return self.model.get_image_features(
                **self.processor(list(images), return_tensors="pt")
            ).pooler_output
        # Padded, as batches are: padding is the end of text, too.
        given = self.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")
        return self.model.get_text_features(**given).pooler_output
