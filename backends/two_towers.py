"""A model of texts and one of images whose vectors lie in one space: CLIP. An item is a text or an image.

*Source:* transformers 5.23, CLIPModel.get_text_features and get_image_features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from backends.ragged import Lengths, Ragged
from backends.vision import Grids, PixelTable

# What config.json says of older checkpoints, wrongly: the end of text is then the highest id of a text.
_WRONG_EOS = 2


class TwoTowers(torch.nn.Module):
    """Both models; forward takes a packed row of texts."""

    def __init__(self, model: Any, table: npt.NDArray[np.float32]) -> None:
        super().__init__()
        self.model = model
        self.pixels = PixelTable(table, next(model.parameters()).device)

    @property
    def eos(self) -> int:
        """The id of the end of text, as the text model's configuration says."""
        return int(self.model.text_model.eos_token_id)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embeddings of words."""
        embeddings: torch.nn.Module = self.model.text_model.embeddings.token_embedding
        return embeddings

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **arguments: Any) -> Any:
        """input_ids and position_ids int64 [1, u] -> the text model's states, normalised, not projected.

        Its own forward refuses a row that is longer than one text may be.
        """
        # Imported by now, as the model was loaded; not before, for that takes seconds.
        from transformers.modeling_outputs import BaseModelOutput

        text = self.model.text_model
        embedded = text.embeddings.token_embedding(input_ids) + text.embeddings.position_embedding(
            position_ids
        )
        output = text.encoder(inputs_embeds=embedded, attention_mask=None, is_causal=True, **arguments)
        return BaseModelOutput(last_hidden_state=text.final_layer_norm(output.last_hidden_state))

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """States [n, h] of the texts' end -> [n, d]."""
        projected: torch.Tensor = self.model.text_projection(states)
        return projected

    def see(self, patches: torch.Tensor, grids: Grids) -> torch.Tensor:
        """[m, d]: see backends.vision.Sees. All grids are alike."""
        _, rows, columns = map(int, grids[0])
        values = self.pixels(patches)
        size = int(values.shape[-1] ** 0.5)
        squares = values.view(-1, rows, columns, 3, size, size)
        pixels = squares.permute(0, 3, 1, 4, 2, 5).reshape(len(grids), 3, rows * size, columns * size)
        output = self.model.get_image_features(pixels)
        states: torch.Tensor = output.pooler_output
        return states


def end_rows(input_ids: Ragged, eos: int) -> Lengths:
    """Places [n] of the first end of text of each sequence, on the host; of its last token where it has
    none.
    """
    ids = input_ids.values.numpy()
    starts, ends = input_ids.offsets[:-1], input_ids.offsets[1:]
    if eos == _WRONG_EOS:
        found = [int(start + ids[start:end].argmax()) for start, end in zip(starts, ends, strict=True)]
        return np.array(found, np.int64)
    places = np.where(ids == eos, np.arange(len(ids)), len(ids))
    first = np.minimum.reduceat(places, starts)
    return np.minimum(first, ends - 1)
