"""Which blocks of queries the attention over a packed batch has, planned on the host once for all layers of a
pass.

The longest come first, so that no long one is left over when the others are done. No triton is needed here.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from kernels.transfer import to_device

Ranges = tuple[tuple[int, int], ...]
"""Places in the packed row, from and to."""
LengthsOfPass = tuple[Sequence[int], Sequence[int] | None, Sequence[Ranges] | None]
"""lengths, key_lengths and prefixes of `make_plan`."""

BLOCKS = (16, 32, 64, 128)
"""Queries that a block may have."""

# The part of the rows of all blocks that may be empty before a smaller block is better.
_MAX_EMPTY = 0.25


@dataclass(frozen=True)
class Plan:
    """Which blocks of queries there are and which keys they see: the same for all layers of one pass."""

    table: torch.Tensor
    """int32 [5 b + 3 r] on the device: of every block its first token, the end of its sequence, the position
    of its first token, where in the table its ranges of keys begin and how many they are; then of every
    range its first token, how many it has and the position of the first."""
    n_blocks: int
    block: int
    """Queries of a block."""
    n_tokens: int
    last_key: int
    """One past the last token that is looked at."""
    has_prefixes: bool


def make_plan(
    lengths: Sequence[int],
    key_lengths: Sequence[int] | None = None,
    prefixes: Sequence[Ranges] | None = None,
    *,
    device: torch.device,
    causal: bool = False,
    max_block: int = 128,
) -> Plan:
    """The plan for sequences of `lengths` [n] end to end, all numbers of the host.

    `key_lengths` [n] says how many tokens at the beginning of each sequence are looked at, `prefixes` [n]
    which ranges of the row each goes on from. `causal` only orders the blocks, `max_block` is of
    `largest_block`. Raises ValueError for lengths that do not fit together.
    """
    own = np.asarray(lengths, np.int64).reshape(-1)
    seen = own if key_lengths is None else np.asarray(key_lengths, np.int64).reshape(-1)
    if len(seen) != len(own) or (seen > own).any() or (seen < 0).any():
        raise ValueError("key_lengths are not as many as lengths, or one is not between 0 and its length")
    if prefixes is not None and len(prefixes) != len(own):
        raise ValueError(f"there are {len(prefixes)} prefixes for {len(own)} sequences")
    starts = np.cumsum(own) - own
    ranges, n_ranges, ahead = _ranges(starts, seen, prefixes)
    rows = choose_block(own, max_block)
    counts = -(-own // rows)
    owner = np.repeat(np.arange(len(own)), counts)
    first = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * rows
    stop = np.minimum(first + rows, own[owner])
    work = ahead[owner] + (np.minimum(stop, seen[owner]) if causal else seen[owner])
    order = np.argsort(-work, kind="stable")
    range_places = 5 * len(owner) + 3 * (np.cumsum(n_ranges) - n_ranges)
    columns = (
        starts[owner] + first,
        (starts + own)[owner],
        ahead[owner] + first,
        range_places[owner],
        n_ranges[owner],
    )
    table = np.concatenate([np.stack(columns, 1)[order].ravel(), ranges.ravel()]).astype(np.int32)
    last_key = int((ranges[:, 0] + ranges[:, 1]).max(initial=0))
    if (ranges[:, :2] < 0).any() or last_key > own.sum():
        raise ValueError(f"a prefix reaches beyond the {int(own.sum())} tokens of the row")
    return Plan(
        to_device(table, device),
        len(owner),
        rows,
        int(own.sum()),
        last_key,
        bool(n_ranges.max(initial=1) > 1),
    )


class Plans(Protocol):
    """Where the attention of each layer has its plan from."""

    def get(self, lengths: LengthsOfPass, *, device: torch.device, causal: bool, max_block: int) -> Plan:
        """As `make_plan`."""


class LastPlan:
    """Keeps the plan of the pass that runs: all its layers come with the very same lengths."""

    def __init__(self) -> None:
        self._known: tuple[LengthsOfPass, tuple[torch.device, bool, int], Plan] | None = None

    def get(self, lengths: LengthsOfPass, *, device: torch.device, causal: bool, max_block: int) -> Plan:
        """As `make_plan`, made anew only for other objects: to compare their numbers would take as long."""
        facts = (device, causal, max_block)
        # Read and written at once, so that threads can only make each other's plan again.
        known = self._known
        if known is not None and facts == known[1] and all(map(operator.is_, lengths, known[0])):
            return known[2]
        plan = make_plan(*lengths, device=device, causal=causal, max_block=max_block)
        self._known = (lengths, facts, plan)
        return plan


last_plan = LastPlan()


class FixedPlans:
    """Plans for a row of always the same `n_tokens`, whose tables stay where they are: a CUDA graph reads
    them.

    Tokens behind the last sequence belong to none: nothing is computed for them, and what stands in their
    rows of the answer is left as it was.
    """

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self._lengths: Sequence[int] = ()
        self._plans: dict[tuple[bool, int], Plan] = {}

    def fill(self, lengths: Sequence[int]) -> None:
        """The sequences of the next pass, none of them empty. Raises ValueError for such as need other blocks
        than those before, or more than there are.
        """
        self._lengths = lengths
        for facts, plan in self._plans.items():
            new = self._make(*facts)
            if new.block != plan.block:
                raise ValueError(
                    f"these lengths need blocks of {new.block}, the plan has blocks of {plan.block}"
                )
            plan.table.copy_(to_device(new.table, plan.table.device))

    def get(self, lengths: LengthsOfPass, *, device: torch.device, causal: bool, max_block: int) -> Plan:
        """The plan for what `fill` was given, whatever the pass says."""
        facts = (causal, max_block)
        if facts not in self._plans:
            new = self._make(*facts)
            self._plans[facts] = replace(new, table=to_device(new.table, device))
        return self._plans[facts]

    def _make(self, causal: bool, max_block: int) -> Plan:
        host = torch.device("cpu")
        plan = make_plan(self._lengths, device=host, causal=causal, max_block=max_block)
        return _pad(plan, self.n_tokens, most_blocks(self.n_tokens, plan.block))


def most_blocks(n_tokens: int, block: int) -> int:
    """Blocks of a plan of fixed size: of `choose_block`'s only the smallest may be so empty that they are too
    few.
    """
    return 2 * n_tokens // block


def count_blocks(lengths: npt.NDArray[np.int64], block: int) -> int:
    """Blocks that sequences of these lengths need."""
    return int((-(-lengths // block)).sum())


def _pad(plan: Plan, n_tokens: int, n_blocks: int) -> Plan:
    """A plan on the host with so many blocks, for a row of so many tokens."""
    old = plan.table.numpy()
    blocks, ranges = old[: 5 * plan.n_blocks].reshape(-1, 5), old[5 * plan.n_blocks :].reshape(-1, 3)
    if plan.n_blocks > n_blocks or len(ranges) > n_blocks or plan.n_tokens > n_tokens or plan.has_prefixes:
        raise ValueError(
            f"{plan.n_blocks} blocks of {plan.n_tokens} tokens do not fit {n_blocks} of {n_tokens}, or have "
            "prefixes"
        )
    table = np.zeros(5 * n_blocks + 3 * (n_blocks + 1), np.int32)
    # A block that ends where it begins stores nothing, and looks at the last range, which has no keys.
    table[: 5 * n_blocks].reshape(-1, 5)[:] = (0, 0, 0, len(table) - 3, 1)
    table[: blocks.size] = (blocks + np.array([0, 0, 0, 5 * (n_blocks - plan.n_blocks), 0])).ravel()
    table[5 * n_blocks : 5 * n_blocks + ranges.size] = ranges.ravel()
    return Plan(torch.from_numpy(table), n_blocks, plan.block, n_tokens, n_tokens, has_prefixes=False)


def _ranges(
    starts: npt.NDArray[np.int64], seen: npt.NDArray[np.int64], prefixes: Sequence[Ranges] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ranges of keys [r, 3], how many each sequence has [n], and tokens that each goes on from [n]."""
    if prefixes is None or not any(prefixes):
        zeros = np.zeros_like(starts)
        return np.stack([starts, seen, zeros], 1), zeros + 1, zeros
    rows: list[tuple[int, int, int]] = []
    ahead = np.zeros_like(starts)
    for i, prefix in enumerate(prefixes):
        position = 0
        for begin, end in prefix:
            rows.append((begin, end - begin, position))
            position += end - begin
        rows.append((int(starts[i]), int(seen[i]), position))
        ahead[i] = position
    return np.array(rows, np.int64), np.array([len(prefix) + 1 for prefix in prefixes], np.int64), ahead


def choose_block(lengths: npt.NDArray[np.int64], max_block: int) -> int:
    """Queries of a block: the largest of which few rows are empty."""
    total = int(lengths.sum())
    for rows in sorted((rows for rows in BLOCKS if rows <= max_block), reverse=True):
        if total >= (1 - _MAX_EMPTY) * count_blocks(lengths, rows) * rows:
            break
    return rows


def largest_block(head_dim: int, dtype: torch.dtype) -> int:
    """Queries of a block, at most: what the registers of its warps hold."""
    if dtype == torch.float32:
        return 32
    return 128 if head_dim <= 128 else 64
