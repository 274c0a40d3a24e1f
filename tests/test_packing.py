"""Packing, for any sequences: read back exactly, no node twice, the budget holds, masks mean what they say."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering_vectors.train.packing import ancestor_mask, block_mask, blocks, common_length, groups, pack

settings.register_profile("packing", deadline=None, max_examples=150)
settings.load_profile("packing")

TOKENS = st.integers(0, 3)  # few, so that sequences share beginnings
SEQUENCES = st.lists(st.lists(TOKENS, max_size=12), max_size=12)
FULL = st.lists(st.lists(TOKENS, min_size=1, max_size=12), min_size=1, max_size=12)


def prefixes(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(s[:k]) for s in sequences for k in range(1, len(s) + 1)}


@given(st.lists(TOKENS, max_size=9), st.lists(TOKENS, max_size=9))
def test_common_length(a: list[int], b: list[int]) -> None:
    n = common_length(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


@given(SEQUENCES, st.integers(1, 40), st.none() | st.integers(1, 5))
def test_every_sequence_is_read_back(sequences: list[list[int]], budget: int, most: int | None) -> None:
    rows = pack(sequences, budget, most)
    found = {n: row.sequence(n) for row in rows for n in row.paths}
    assert found == dict(enumerate(sequences))
    assert sum(len(row.paths) for row in rows) == len(sequences)
    for row in rows:
        assert len(row.ids) == len(row.depth) == len(row.end)
        for path in row.paths.values():
            assert [row.depth[node] for node in path] == list(range(len(path)))


@given(SEQUENCES)
def test_one_row_has_a_node_for_each_distinct_prefix(sequences: list[list[int]]) -> None:
    rows = pack(sequences, 1000)
    assert len(rows) == min(len(sequences), 1)
    assert sum(map(len, rows)) == len(prefixes(sequences))


@given(SEQUENCES, st.integers(1, 40), st.none() | st.integers(1, 5))
def test_budget_holds(sequences: list[list[int]], budget: int, most: int | None) -> None:
    for row in pack(sequences, budget, most):
        texts = [row.sequence(n) for n in row.paths]
        assert len(row) == len(prefixes(texts))  # each node once in its row
        assert len(row) <= budget or len({tuple(t) for t in texts if t}) == 1 or all_on_one_path(texts)
        assert most is None or len(row.paths) <= most


def all_on_one_path(texts: list[list[int]]) -> bool:
    "A text longer than the budget may have its own beginnings beside it, which cost nothing."
    longest = max(texts, key=len)
    return all(text == longest[: len(text)] for text in texts)


@given(FULL, st.integers(1, 40))
def test_mask_is_ancestry(sequences: list[list[int]], budget: int) -> None:
    for row in pack(sequences, budget):
        mask = ancestor_mask(torch.tensor(row.end))
        seen = [set() for _ in row.ids]
        for path in row.paths.values():
            for i, node in enumerate(path):
                seen[node] |= set(path[: i + 1])
        assert [set(line.nonzero()[:, 0].tolist()) for line in mask] == seen


@given(FULL, st.integers(1, 5), st.integers(1, 5))
def test_windows_and_chunks_count_depth(sequences: list[list[int]], window: int, chunk: int) -> None:
    (row,) = pack(sequences, 1000)
    end, depth = torch.tensor(row.end), torch.tensor(row.depth)
    near, same = ancestor_mask(end, depth, window=window), ancestor_mask(end, depth, chunk=chunk)
    for path in row.paths.values():
        for i, node in enumerate(path):
            assert near[node].nonzero()[:, 0].tolist() == path[max(0, i + 1 - window) : i + 1]
            assert same[node].nonzero()[:, 0].tolist() == path[i // chunk * chunk : i + 1]


@given(FULL, st.integers(1, 9), st.none() | st.integers(1, 5))
def test_blocks_see_what_the_whole_mask_shows(sequences: list[list[int]], size: int, window: int | None) -> None:
    (row,) = pack(sequences, 1000)
    end, depth = torch.tensor(row.end), torch.tensor(row.depth)
    cut, whole = blocks(row, size), ancestor_mask(end, depth, window)
    few = block_mask(cut, end, depth, window)
    for node in range(len(row)):
        i, j = divmod(node, size)
        assert sorted(cut.keys[i][few[i, j]].tolist()) == whole[node].nonzero()[:, 0].tolist()


@given(FULL, st.integers(4, 60), st.none() | st.integers(1, 4), st.integers(0, 8))
def test_groups_share_what_they_say(sequences: list[list[int]], budget: int, most: int | None, cost: int) -> None:
    unshared = [len(s) - 1 for s in sequences]
    found = groups(sequences, unshared, budget, most, cost)
    assert sorted(n for group in found for n in group.numbers) == list(range(len(sequences)))
    for shared, numbers in found:
        assert most is None or len(numbers) <= most
        assert all(shared <= unshared[n] and sequences[n][:shared] == sequences[numbers[0]][:shared] for n in numbers)
        if len(numbers) > 1:
            assert len(numbers) * (max(len(sequences[n]) for n in numbers) - shared) <= budget
