"""Which token of each sequence a head reads that reads one only: the encoder sends no other then.

*Source:* for UNPADDED transformers 5.23 GenericForSequenceClassification: the rightmost token that is not
padding, also where a text itself holds that token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from backends.checkpoint import Checkpoint
    from backends.ragged import Lengths, Ragged

LAST = "last"
UNPADDED = "unpadded"


def token_rows(kind: str, input_ids: Ragged, checkpoint: Checkpoint) -> Lengths:
    """Places [n] in a batch on the host, one of each sequence: its last token, or for UNPADDED its last one
    that is not padding; the first where all are.
    """
    last: Lengths = input_ids.offsets[1:] - 1
    pad = checkpoint.config.get("pad_token_id")
    if kind == LAST or pad is None:
        return last
    ids = input_ids.values.numpy()
    kept = np.where(ids != pad, np.arange(len(ids)), -1)
    found: Lengths = np.maximum.reduceat(kept, input_ids.offsets[:-1])
    return np.maximum(found, input_ids.offsets[:-1])
