"""Every node of a tree runs once, and every sequence is as if it ran alone."""

import random

import numpy as np
import pytest
import torch
from support_zoo import tiny_model

from fastpref.data.packing import Scored, pack
from fastpref.data.tree import MOST_OWN, Beginnings, tree
from fastpref.models import attention
from fastpref.models.segments import Segment
from fastpref.trainers.forward import by_sequence, head_labels, head_rows, hidden_rows


def random_tree(seed: int) -> list[list[int]]:
    """Paths of a random tree: any depth and width, equal ones, one the beginning of another, strangers."""
    draw = random.Random(seed)
    paths = [[draw.randrange(3, 90) for _ in range(draw.randrange(1, 9))]]
    for _ in range(draw.randrange(1, 10)):
        base = draw.choice(paths)
        kept = draw.choice([0, 1, len(base), draw.randrange(len(base) + 1)])
        paths.append(base[:kept] + [draw.randrange(3, 90) for _ in range(draw.choice([0, 0, 1, draw.randrange(9)]))])
    return [path or [5] for path in paths]


def nodes(paths: list[list[int]]) -> int:
    return len({tuple(path[: n + 1]) for path in paths for n in range(len(path))})


@pytest.mark.parametrize("seed", range(30))
def test_a_tree_has_each_beginning_once(seed):
    paths = random_tree(seed)
    beginnings = Beginnings(paths)
    found = tree(beginnings.ids, beginnings.branches(range(len(paths))))
    assert len(found.ids) == beginnings.nodes(range(len(paths))) == nodes(paths)
    for path, rows in zip(paths, found.rows, strict=True):
        assert found.ids[rows].tolist() == path
        assert found.positions[rows].tolist() == list(range(len(path)))
    seen = {row: segment for segment in found.segments for row in range(segment.start, segment.end)}
    for rows in found.rows:  # a token sees exactly the rows of its path
        segment = seen[int(rows[-1])]
        before = [row for start, end in segment.ranges for row in range(start, end)]
        assert before[: len(rows)] == rows.tolist()
    end = 0
    for segment in found.segments:
        assert segment.start == end
        end = segment.end


def test_sequences_of_other_columns_and_of_no_order_are_one_tree():
    paths = [[1, 2, 3, 4], [7, 8], [1, 2, 3, 5], [1, 2], [7, 9], [1, 2, 3, 4], [1, 2, 3, 4, 6]]
    beginnings = Beginnings(paths)
    found = tree(beginnings.ids, beginnings.branches(range(len(paths))))
    assert found.ids.tolist() == [1, 2, 3, 5, 4, 6, 7, 8, 9]  # trees in the order of their first sequences
    assert found.segments == [Segment(0, 4), Segment(4, 6, ((0, 3),)), Segment(6, 8), Segment(8, 9, ((6, 7),))]


def test_the_same_tokens_in_other_contexts_are_others():
    """Of different images, for example."""
    long = list(range(500))
    beginnings = Beginnings(
        [[1, 2, 3], [1, 2, 4], [1, 2, 3], [9, *long], [9, *long[::-1]]], [b"a", b"b", b"a", b"c", b"c"]
    )
    assert beginnings.nodes(range(3)) == 6
    assert beginnings.nodes([3, 4]) == 1 + 2 * len(long)  # in a context a single token, too


def test_a_few_common_tokens_of_long_strangers_are_run_again():
    """Attention to gathered keys would cost more than those tokens do."""
    long, other = [1, *range(2, 2 + 2 * MOST_OWN)], [1, *range(500, 500 + 2 * MOST_OWN)]
    assert Beginnings([long, other]).nodes([0, 1]) == len(long) + len(other)
    assert Beginnings([[1, *long], [1, *other]]).nodes([0, 1]) == 2 + len(long) + len(other) - 2


def test_any_of_the_sequences_have_a_tree_of_their_own():
    beginnings = Beginnings([[1, 2, 3], [1, 2, 4], [1, 5]])
    assert [beginnings.nodes(some) for some in ([0], [0, 1], [1, 2], [0, 1, 2])] == [3, 4, 4, 5]


def logps(model, sequences: list[Scored], layout: str) -> torch.Tensor:
    batch = pack(sequences, layout)
    hidden = hidden_rows(model, batch).index_select(0, head_rows(batch))
    scored = model.lm_head(hidden).log_softmax(-1).gather(1, head_labels(batch)[0].clamp(min=0)[:, None])[:, 0]
    return by_sequence(scored, batch)


@pytest.fixture(scope="module")
def model():
    found = tiny_model("starcoder2", 3.0, sliding_window=7).double()  # its norms are not in fp32
    attention.enable(found)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_log_probs_and_gradients_are_those_of_separate_sequences(model, seed):
    draw = random.Random(seed)
    sequences = [Scored(path, draw.randrange(len(path) + 1)) for path in random_tree(100 + seed)]
    found = logps(model, sequences, "shared")
    alone = torch.cat([logps(model, [s], "padded") for s in sequences])
    torch.testing.assert_close(found, alone, rtol=1e-11, atol=1e-11)
    weights = torch.randn(len(found), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gradients = [
        torch.autograd.grad((x * weights).sum(), list(model.parameters()), allow_unused=True) for x in (found, alone)
    ]
    for one, other in zip(*gradients, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_head_has_each_node_once_for_each_target():
    prompt, a, b = [1, 2, 3], [4, 5], [6, 7, 8]
    sequences = [Scored(prompt + r, 3) for r in (a, a, b, b)]
    batch = pack(sequences, "shared")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch["head_rows"].tolist() == [2, 2, 3, 5, 6]
    assert batch["head_labels"].tolist() == [4, 6, 5, 7, 8]
    index = batch["head_index"]
    assert torch.equal(batch["head_labels"][index], batch["labels"])
    assert torch.equal(batch["head_rows"][index], batch["rows"])
    assert "head_rows" not in pack(sequences[1:3], "shared")
    assert "head_rows" not in pack(sequences, "packed")


def test_a_thousand_long_sequences_are_found_without_a_loop_over_tokens(monkeypatch):
    calls = []
    original = np.asarray
    monkeypatch.setattr(np, "asarray", lambda *a, **k: calls.append(1) or original(*a, **k))
    paths = [list(range(3000)) + [i] * 1000 for i in range(200)]
    assert Beginnings(paths).nodes(range(200)) == 3000 + 200 * 1000 + 0
    assert len(calls) == 200
