"""Whether /dev/shm has room for an answer: the stages of a server hand their tensors on through it, and a
container has 64 MB of it unless somebody gives it more.
"""

from __future__ import annotations

import os

from backends.contract import ErrorCode
from backends.errors import RequestError

_PATH = "/dev/shm"
# Answers of other threads and other stages grow while this one is looked at.
_OTHERS = 4
_OTHERS_BYTES = 16 * 2**20


def is_scarce(needed: int) -> bool:
    """Whether `needed` bytes might not fit any more. It takes a microsecond or two."""
    room = os.statvfs(_PATH)
    return room.f_bavail * room.f_frsize < needed * _OTHERS + _OTHERS_BYTES


def no_room(needed: int) -> RequestError:
    """What is answered instead of `needed` bytes."""
    return RequestError(
        ErrorCode.OUT_OF_MEMORY,
        f"{_PATH} has no room for {needed} bytes of this model's tensors at the moment; send fewer or "
        "shorter inputs at a time, or try again in a while (the operator can give the container more of it "
        "with --shm-size, or lower --max-batch-tokens)",
    )
