"""A language model whose words may be patches of images: Qwen2-VL and its like.

*Source:* transformers 5.23, Qwen2VLModel.forward: image states take the places of the image tokens among the
embedded words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from backends.vision import Grids, PixelTable

DeepStates = Callable[[Any], list[torch.Tensor]]


class VisionLanguage(torch.nn.Module):
    """Both parts of a loaded model; forward takes a packed row as those of texts do."""

    def __init__(self, model: Any, table: npt.NDArray[np.float32], frames: int) -> None:
        """`frames` pictures make a patch of the model's, as in a film; those of an image are all the same."""
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        self.pixels = PixelTable(table, device)
        self.frames = frames

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embeddings of words."""
        embeddings: torch.nn.Module = self.model.get_input_embeddings()
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        image_states: torch.Tensor | None = None,
        image_places: torch.Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """input_ids int64 [1, u]; image_states [r, d, h] stand at `image_places` [r] instead of words: the
        first of the d, and the others are added behind as many layers.
        """
        embedded = self.get_input_embeddings()(input_ids)
        if image_states is not None and image_places is not None:
            embedded = embedded.index_copy(1, image_places, image_states[None, :, 0].to(embedded.dtype))
            if image_states.shape[1] > 1:
                mask = torch.zeros(input_ids.shape, dtype=torch.bool, device=input_ids.device)
                mask[0, image_places] = True
                arguments["visual_pos_masks"] = mask
                arguments["deepstack_visual_embeds"] = list(image_states[:, 1:].unbind(1))
        return self.model.language_model(inputs_embeds=embedded, **arguments)

    def see(self, patches: torch.Tensor, grids: Grids) -> torch.Tensor:
        """[r, d, h]: see backends.vision.Sees."""
        values = self.pixels(patches)
        frames = values[:, :, None].expand(-1, -1, self.frames, -1).reshape(len(values), -1)
        output = self.model.get_image_features(frames, torch.from_numpy(grids).to(frames.device))
        deep = getattr(output, "deepstack_features", None) or []
        states = torch.cat(list(output.pooler_output))
        return torch.stack([states, *(_joined(part) for part in deep)], dim=1)


def _joined(part: Any) -> torch.Tensor:
    return part if isinstance(part, torch.Tensor) else torch.cat(list(part))
