"""A keyed permutation of 0..n-1 that needs no table: a Feistel network with cycle-walking.

Integer arithmetic only, so the order is the same on every machine and with every numpy, and any place of it can be
computed without the ones before. Shuffles documents before they are written, windows in an epoch, slots in a batch.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8  # an even number, so that the two unequal halves end where they began

_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64, Steele et al. 2014


def key(*parts: int | str) -> NDArray[np.uint64]:
    """Round keys uint64 [ROUNDS] from anything that names a permutation, such as (seed, domain, epoch)."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(indices: NDArray[np.uint64], n: int, *, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Places uint64 [...] of `indices` (each below n) in the permutation of 0..n-1 named by the round keys."""
    bits = max((n - 1).bit_length(), 2)  # the network permutes 2**bits < 2n numbers for n > 2
    half = bits // 2
    out = _network(np.asarray(indices, dtype=np.uint64), half, bits - half, round_keys)
    # Cycle-walking: a result outside 0..n-1 goes through again; it stays a permutation of 0..n-1.
    while (outside := out >= n).any():
        out[outside] = _network(out[outside], half, bits - half, round_keys)
    return out


def shuffled(n: int, *, round_keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The whole permutation, int64 [n]."""
    return permute(np.arange(n, dtype=np.uint64), n, round_keys=round_keys).astype(np.int64)


def _network(x: NDArray[np.uint64], high: int, low: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    left, right = x >> np.uint64(low), x & np.uint64((1 << low) - 1)
    for round_key in round_keys:
        mixed = right ^ round_key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
        mixed ^= mixed >> np.uint64(31)
        left, right = right, (left ^ mixed) & np.uint64((1 << high) - 1)
        high, low = low, high
    return (left << np.uint64(low)) | right
