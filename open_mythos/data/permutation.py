"""The data order of a run: a permutation that is computed for single indices, without state or a table.

Shapes: N numbers.
"""

import numpy as np

ROUNDS = 4


def permute(index: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Return where a permutation of [0, n) takes each index: (N,) -> (N,) int64. Another key is another permutation.

    A Feistel network over the next power of four, applied again to what falls outside [0, n). Source: Black and Rogaway
    2002, "Ciphers with Arbitrary Finite Domains", section on cycle walking.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    round_keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    x = index.astype(np.uint64)
    outside = np.ones(len(x), dtype=bool)
    while outside.any():
        x[outside] = _feistel(x[outside], half, round_keys)
        outside = x >= n
    return x.astype(np.int64)


def _feistel(x: np.ndarray, half: int, round_keys: np.ndarray) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = x >> shift, x & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Scatter neighbouring values (the finaliser of SplitMix64; arithmetic wraps)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def in_epochs(index: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Rows that go through [0, n) once before any comes again, every time in another order: (N,) -> (N,) int64."""
    out = np.empty(len(index), dtype=np.int64)
    for epoch in np.unique(index // n):
        here = index // n == epoch
        out[here] = permute(index[here] % n, n, (*key, int(epoch)))
    return out


BLOCK = 1000
"""Rows over which the shares of a mixture are exact."""


def mixture_counts(weights: tuple[float, ...]) -> np.ndarray:
    """Return the rows of a `BLOCK` from each source: by largest remainders, at least one of a positive weight."""
    share = np.array(weights) / sum(weights) * BLOCK
    counts = np.maximum(np.floor(share), share > 0).astype(np.int64)
    for i in np.argsort(counts - share, kind="stable")[: max(0, BLOCK - counts.sum())]:
        counts[i] += 1
    while counts.sum() > BLOCK:
        counts[counts.argmax()] -= 1
    return counts


def mix(index: np.ndarray, weights: tuple[float, ...], key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each row and the row's number within that source, from 0: (N,) -> (N,), (N,) int64."""
    counts = mixture_counts(weights)
    blocks, places = np.divmod(index, BLOCK)
    source, number = np.empty(len(index), dtype=np.int64), np.empty(len(index), dtype=np.int64)
    for block in np.unique(blocks):
        slots = permute(np.arange(BLOCK), BLOCK, (*key, int(block)))
        sources = np.searchsorted(counts.cumsum(), slots, side="right")
        # A source's rows are counted in the order in which they come, so that it goes through its windows in turn.
        earlier = np.empty(BLOCK, dtype=np.int64)
        for i, count in enumerate(counts):
            earlier[sources == i] = np.arange(count)
        here = blocks == block
        source[here] = sources[places[here]]
        number[here] = block * counts[source[here]] + earlier[places[here]]
    return source, number
