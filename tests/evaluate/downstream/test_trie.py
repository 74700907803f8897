"""Rows of tries: each path is its sequence, attends to itself alone, and nothing shared is computed twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tasks.evaluate.downstream import trie

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=9)


@given(st.lists(TOKENS, min_size=1, max_size=12), st.integers(1, 12))
def test_every_path_spells_its_sequence_and_attends_to_itself_alone(sequences: list[list[int]], most: int) -> None:
    rows = trie.rows(sequences, most=most)
    assert sorted(number for row in rows for number in row.paths) == list(range(len(sequences)))
    for row in rows:
        seen_LL = row.ancestors()
        assert len(row.ids) <= max(most, *(len(sequences[number]) * 3 // 2 for number in row.paths))
        for number, path in row.paths.items():
            assert [row.ids[node] for node in path] == sequences[number]
            assert [row.depths[node] for node in path] == list(range(len(path)))
            for depth, node in enumerate(path):
                assert seen_LL[node].nonzero()[0].tolist() == path[: depth + 1]


@given(st.lists(TOKENS, min_size=1, max_size=12))
def test_a_row_has_a_node_for_each_different_prefix(sequences: list[list[int]]) -> None:
    (row,) = trie.rows(sequences, most=1000)
    assert len(row.ids) == len({tuple(each[:end]) for each in sequences for end in range(1, len(each) + 1)})


def test_an_items_context_is_computed_once_for_all_its_endings() -> None:
    endings = [[*range(70), 100 + i, 200] for i in range(4)]
    for most in (512, 64):
        (row,) = trie.rows(endings, most=most)
        assert len(row.ids) == 70 + 4 * 2
