"""How many images a second does a running server embed, what does one cost, and what do texts beside them.

    .venv-test/bin/python perf/images.py --make random-clip
    scripts/serve random-clip &
    .venv-test/bin/python perf/images.py --reference random-clip

The checkpoint has the shapes of clip-vit-base-patch32 with random weights, which is as fast as a trained
one; the image is a JPEG file of 640 x 480. Rounds take turns, so that a noisy machine is noisy to all of
them; --reference adds transformers in this process, in the number format that the server computes in here.
Rows go to perf/results/images.csv.
"""

import argparse
import asyncio
import base64
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import torch
from recording import append_rates

from backends.device import compute_dtype
from tests.support.multimodal import clip, encoded, picture

SHAPE = {"num_hidden_layers": 12}
TEXT = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, **SHAPE}
VISION = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 32,
    **SHAPE,
}
PICTURE = encoded(picture(640, 480), "JPEG", quality=90)
IMAGE = {"image": "data:image/jpeg;base64," + base64.b64encode(PICTURE).decode()}
WORDS = {"text": "a photo of the value of this class"}
# (clients, items of a request, requests of each client)
LOADS = {
    "1 client x 1 image": (1, [IMAGE], 8),
    "1 client x 1 text": (1, [WORDS], 8),
    "4 clients x 16 images": (4, [IMAGE] * 16, 2),
    "4 clients x 16 texts": (4, [WORDS] * 16, 4),
    "4 clients x 8 images, 8 texts": (4, [IMAGE, WORDS] * 8, 2),
}


async def run_load(url: str, clients: int, items: list[dict[str, str]], repeats: int) -> float:
    """Items a second."""

    async def client(session: aiohttp.ClientSession) -> None:
        for _ in range(repeats):
            body = {"input": items, "encoding_format": "base64"}
            async with session.post(f"{url}/v1/embeddings", json=body) as answer:
                answer.raise_for_status()
                await answer.read()

    async with aiohttp.ClientSession() as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        return clients * repeats * len(items) / (time.perf_counter() - began)


def reference(path: Path) -> Callable[[], float]:
    """Images a second of transformers, 16 at a time: reading the file, its processor, the model."""
    import io

    import transformers
    from PIL import Image

    dtype = compute_dtype("auto", torch.device("cpu"))
    model = transformers.CLIPModel.from_pretrained(path, dtype=dtype).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(path)

    def run() -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            for _ in range(4):
                pictures = [Image.open(io.BytesIO(PICTURE)) for _ in range(16)]
                pixels = processor(pictures, return_tensors="pt").pixel_values
                model.get_image_features(pixels.to(dtype))
        return 4 * 16 / (time.perf_counter() - began)

    return run


async def measure(url: str, rounds: int, checkpoint: Path | None) -> None:
    rates: dict[str, list[float]] = {name: [] for name in LOADS}
    other = None if checkpoint is None else reference(checkpoint)
    for load in LOADS.values():
        await run_load(url, *load)
    for _ in range(rounds):
        for name, load in LOADS.items():
            rates[name].append(await run_load(url, *load))
        if other is not None:
            rates.setdefault("transformers, 16 images", []).append(other())
    append_rates("images.csv", "items", rates, digits=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:30000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--make", type=Path, help="write the checkpoint there, and stop")
    parser.add_argument("--reference", type=Path, help="the same checkpoint in transformers, too")
    arguments = parser.parse_args()
    if arguments.make:
        clip(arguments.make, TEXT, VISION, projection_dim=512)
    else:
        asyncio.run(measure(arguments.url, arguments.rounds, arguments.reference))


if __name__ == "__main__":
    main()
