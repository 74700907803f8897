"""Lays sequences into rows as tries, so that what sequences share at their start is computed once.

The answers of a multiple-choice item share its context, and items share instructions. In a row every node is a token
that attends to the nodes before it on its own path and to no other (SpecInfer's token tree, arXiv 2305.09781, section
4.2), at the position that is its depth. A row therefore gives every sequence the hidden states that it has by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Row:
    """The nodes of one row, each after its parent."""

    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    """The node before each on its path; -1 for the first of a path."""
    depths: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)
    """{number of a sequence: the nodes of its tokens}."""

    def ancestors(self) -> np.ndarray:
        """bool [L, L]: whether a node (row) attends to another (column): itself, and those before it on its path."""
        seen_LL = np.eye(len(self.ids), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen_LL[node] |= seen_LL[parent]
        return seen_LL


def rows(sequences: Sequence[Sequence[int]], *, most: int) -> list[Row]:
    """All sequences in rows of at most `most` nodes, or half as many again as a long sequence has tokens.

    That is room for the other answers after a long context. Sequences are taken in the order of their tokens, in which
    those with the longest common prefix are neighbours.
    """
    made: list[Row] = []
    path: list[int] = []  # the nodes of the sequence before
    for number in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        tokens = sequences[number]
        shared = 0
        if made:
            ids = made[-1].ids
            while shared < min(len(path), len(tokens)) and ids[path[shared]] == tokens[shared]:
                shared += 1
        if not made or len(made[-1].ids) + len(tokens) - shared > max(most, len(tokens) * 3 // 2):
            made.append(Row())
            shared = 0
        row = made[-1]
        path = path[:shared]
        for depth in range(shared, len(tokens)):
            row.parents.append(path[-1] if path else -1)
            row.depths.append(depth)
            path.append(len(row.ids))
            row.ids.append(tokens[depth])
        row.paths[number] = list(path)
    return made
