"""What the time of a request was spent on.

    receive     reading and checking its body, and fetching its images
    admission   waiting in the gateway for a turn
    image       making its images ready
    tokenise    its own texts
    queue       waiting in the server for the tokenizer and the encoder, and the ways between
    encode      from its first forward pass to its last
    head        from there until its answer is back: heads, and the way to the gateway
    server      all that the server took, of a model whose entries do not tell more
    serialise   comparing, sorting and writing the answer

The server's stages give the moments of this one request, by the clock that all processes of a machine share.
Of the server requests of one request, which run side by side, the one that ends last is the one that counts.
On a GPU forward passes are only started when `encode` ends: what is left of them is in `head`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.contract import ENCODER_TIMES, IMAGE_TIMES, TOKENIZER_TIMES
from gateway.context import RequestContext, ServerRequest

RECEIVE = "receive"
ADMISSION = "admission"
IMAGE = "image"
TOKENISE = "tokenise"
QUEUE = "queue"
ENCODE = "encode"
HEAD = "head"
SERVER = "server"
SERIALISE = "serialise"

TIMES = frozenset({IMAGE_TIMES, TOKENIZER_TIMES, ENCODER_TIMES})


def read_times(answer: Mapping[str, Any], sent: float, received: float) -> dict[str, float]:
    """Seconds of the phases of one server request that was sent and answered at these time.monotonic().

    Where the server's clock is another, being on another machine, the ways to it and from it are in `head`.
    """
    whole = received - sent
    if not answer.keys() >= {TOKENIZER_TIMES, ENCODER_TIMES}:
        return {SERVER: whole}
    tokenised, tokenised_until = _seconds(answer[TOKENIZER_TIMES])
    _, encoded, encoded_until = _seconds(answer[ENCODER_TIMES])
    image, first = 0.0, tokenised
    phases = {}
    if IMAGE_TIMES in answer:
        first, image_until = _seconds(answer[IMAGE_TIMES])
        image = image_until - first
        phases[IMAGE] = image
    is_one_clock = sent <= first and encoded_until <= received
    begin = sent if is_one_clock else first
    tokenise, encode = tokenised_until - tokenised, encoded_until - encoded
    queue = encoded_until - begin - image - tokenise - encode
    head = whole - (encoded_until - begin)
    return {**phases, TOKENISE: tokenise, QUEUE: queue, ENCODE: encode, HEAD: head}


def _seconds(times: Any) -> list[float]:
    """A tensor [1, k] of microseconds."""
    return [float(moment) / 1e6 for moment in times[0]]


def record(context: RequestContext, began: float, ended: float, phases: Mapping[str, float]) -> None:
    """Adds the phases of a server request that ended last of all until now.

    It takes the place of one that it ran beside, whose time is not the request's twice.
    """
    before = context.last_server_request
    if before is not None and began < before.ended:
        for name, seconds in before.phases.items():
            context.phases[name] -= seconds
    for name, seconds in phases.items():
        context.phases[name] = context.phases.get(name, 0.0) + seconds
    context.last_server_request = ServerRequest(ended, phases)


def header(phases: Mapping[str, float], total: float) -> str:
    """The value of a Server-Timing header, in milliseconds."""
    return ", ".join(
        f"{name};dur={1000 * seconds:.3f}" for name, seconds in {**phases, "total": total}.items()
    )
