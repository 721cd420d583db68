"""How long each kernel takes on a GPU, and torch's own way beside it.

    .venv-test/bin/python perf/kernels.py
    TRITON_INTERPRET=1 .venv-test/bin/python perf/kernels.py --interpret

Medians of triton.testing.do_bench, in microseconds; bfloat16, packed batches of 64 texts, of equal and of
very different lengths. Before anything is timed the two answers are compared. Rows go to
perf/results/kernels.csv. The second command runs every case once, tiny and without a GPU, and keeps nothing:
it shows that the script works.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from recording import append

from kernels import (
    attention_plan,
    gated_activation,
    max_sim,
    residual_norm,
    rotary,
    segment_pooling,
    sparse_max,
    varlen_attention,
)

# Half a unit of the last place of bfloat16 in each of a few roundings, of values up to 8; sums are longer.
TOLERANCE = 6e-2


@dataclass(frozen=True)
class Sizes:
    """What is timed: a base-sized encoder, or next to nothing."""

    device: torch.device
    dtype: torch.dtype
    n: int
    longest: int
    hidden: int
    heads: int
    vocabulary: int

    def lengths(self, *, skewed: bool) -> list[int]:
        """Of n texts: a quarter of the longest, or one longest for seven of a sixteenth."""
        if not skewed:
            return [self.longest // 4] * self.n
        return sorted([self.longest if i % 8 == 0 else max(self.longest // 16, 1) for i in range(self.n)])[
            ::-1
        ]

    def numbers(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)


GPU = Sizes(torch.device("cuda"), torch.bfloat16, 64, 2048, 1024, 16, 30522)
TINY = Sizes(torch.device("cpu"), torch.float16, 4, 32, 32, 2, 300)

Way = Callable[[], torch.Tensor]
Case = tuple[str, Way, dict[str, Way]]
"""What, the kernel, and torch's ways by name."""


def attention(sizes: Sizes, name: str, lengths: list[int]) -> Iterator[Case]:
    size = sizes.hidden // sizes.heads
    fused = sizes.numbers(sum(lengths), 3 * sizes.heads, size)
    q, k, v = fused.split(sizes.heads, 1)
    for kind, causal, window in (("", False, None), (" causal", True, None), (" window", False, 64)):
        plan = attention_plan.make_plan(lengths, device=sizes.device, causal=causal)
        options = {"causal": causal, "window": window}
        yield (
            f"attention {name}{kind}",
            partial(varlen_attention.varlen_attention, q, k, v, plan, **options),
            attention_ways(q, k, v, lengths, causal) if window is None else {},
        )


def cases(sizes: Sizes) -> Iterator[Case]:
    yield from attention(sizes, "equal", sizes.lengths(skewed=False))
    yield from attention(sizes, "skewed", sizes.lengths(skewed=True))
    yield from layers(sizes)
    yield from heads(sizes)


def attention_ways(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], causal: bool
) -> dict[str, Way]:
    def one_by_one() -> torch.Tensor:
        rows = [torch.split(x, lengths) for x in (q, k, v)]
        parts = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), is_causal=causal)
            for part in zip(*rows, strict=True)
        ]
        return torch.cat([part[0].transpose(0, 1) for part in parts])

    # What a padded batch costs, without the copies that pad it. Padding lies behind, where a causal token
    # does not look; else it takes a mask.
    rows = [torch.nn.utils.rnn.pad_sequence(torch.split(x, lengths), batch_first=True) for x in (q, k, v)]
    padded = [x.transpose(1, 2).contiguous() for x in rows]
    own = torch.arange(max(lengths), device=q.device)[None] < torch.tensor(lengths, device=q.device)[:, None]
    mask = None if causal or len(set(lengths)) == 1 else own[:, None, None]

    def in_one_padded_batch() -> torch.Tensor:
        return F.scaled_dot_product_attention(*padded, attn_mask=mask, is_causal=causal)

    return {"sdpa one by one": one_by_one, "sdpa padded": lambda: in_one_padded_batch().transpose(1, 2)[own]}


def layers(sizes: Sizes) -> Iterator[Case]:
    t, h = sizes.n * sizes.longest // 4, sizes.hidden
    x, residual, weight, bias = (sizes.numbers(*shape) for shape in ((t, h), (t, h), (h,), (h,)))
    yield (
        "residual + LayerNorm",
        lambda: residual_norm.layer_norm(x, weight, bias, 1e-5, residual),
        {"torch": lambda: F.layer_norm(x + residual, (h,), weight, bias, 1e-5)},
    )
    yield (
        "residual + RMSNorm",
        lambda: residual_norm.add_rms_norm(x, residual, weight, 1e-6)[0],
        {"torch": lambda: F.rms_norm(x + residual, (h,), weight, 1e-6)},
    )
    fused = sizes.numbers(t, 6 * h)
    gate, up = fused.chunk(2, 1)
    yield (
        "gelu(gate) * up",
        lambda: gated_activation.gated_activation(fused, activation="gelu"),
        {"torch": lambda: F.gelu(gate) * up},
    )
    # With angles of 0 the heads stay what they are, however often they are turned.
    q, k = (sizes.numbers(t, sizes.heads, h // sizes.heads) for _ in range(2))
    cos, sin = (
        torch.ones(t, h // sizes.heads, device=q.device),
        torch.zeros(t, h // sizes.heads, device=q.device),
    )
    yield (
        "rotary",
        lambda: rotary.rotate_(q, k, cos, sin)[0],
        {"torch": lambda: rotary.rotate_reference(q, k, cos, sin)[0]},
    )


def heads(sizes: Sizes) -> Iterator[Case]:
    lengths = sizes.lengths(skewed=True)
    t = sum(lengths)
    counts = torch.tensor(lengths, device=sizes.device)
    segments = torch.repeat_interleave(torch.arange(sizes.n, device=sizes.device), counts)
    hidden, logits = sizes.numbers(t, sizes.hidden), sizes.numbers(min(t, 8192), sizes.vocabulary)
    total = torch.zeros(sizes.n, sizes.hidden, device=sizes.device)
    yield (
        "mean pooling",
        lambda: segment_pooling.pool(hidden, lengths, "mean"),
        {"torch": lambda: torch.index_add(total, 0, segments, hidden.float()) / counts[:, None]},
    )
    parts = [len(part) for part in torch.chunk(logits, sizes.n)]
    yield (
        "SPLADE",
        lambda: sparse_max.splade(logits, parts),
        {
            "torch": lambda: torch.stack(
                [p.amax(0).relu().float().log1p() for p in torch.split(logits, parts)]
            )
        },
    )
    width = min(128, sizes.hidden)
    queries, documents = sizes.numbers(32, width) / width, sizes.numbers(t, width)
    yield (
        "MaxSim",
        lambda: max_sim.max_sim(queries, [32], documents, lengths),
        {"torch": lambda: max_sim.max_sim_reference(queries, [32], documents, lengths)},
    )
    weights, ids = sizes.numbers(t).float(), torch.randint(0, sizes.vocabulary, (t,), device=sizes.device)
    unused = torch.arange(4, device=sizes.device)
    yield (
        "lexical weights",
        lambda: sparse_max.lexical_weights(weights, ids, lengths, unused),
        {"torch": lambda: sparse_max.lexical_weights_reference(weights, ids, lengths, unused)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--interpret", action="store_true", help="every case once, tiny, without a GPU")
    is_tiny = parser.parse_args().interpret
    if not is_tiny and not torch.cuda.is_available():
        parser.exit(1, "there is no GPU here, and these kernels run on nothing else\n")
    sizes = TINY if is_tiny else GPU
    torch.manual_seed(0)
    rows = []
    for name, kernel, ways in cases(sizes):
        expected = {way: run() for way, run in ways.items()}
        got = kernel()
        for value in expected.values():
            torch.testing.assert_close(got.float(), value.float(), atol=TOLERANCE, rtol=TOLERANCE)
        for way, run in {"kernel": kernel, **ways}.items():
            took = "" if is_tiny else f"{1000 * median(run):.1f}"
            print(f"{name:<24} {way:<16} {took:>10}", flush=True)
            rows.append([name, way, took])
    if not is_tiny:
        append(
            "kernels.csv",
            ["case", "way", "us", "gpu"],
            [[*row, torch.cuda.get_device_name()] for row in rows],
        )


def median(run: Way) -> float:
    """Milliseconds."""
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
