"""Batches: the plan is fixed by rows, seed and global batch; micro-batches obey their budget and lose nothing."""

from itertools import chain

import numpy as np
import pytest
import torch

from training.data.batch import (
    collate,
    cut_rows,
    cut_trees,
    digest_plan,
    first_fit,
    pack_by_tokens,
    plan_steps,
    spread,
)
from training.data.stems import Family
from training.render import Rendered


def test_pack_by_tokens_by_hand() -> None:
    # longest first: 50 alone (over the budget), 9 alone (9 x 2 > 12), 4 4 3 (4 x 3 = 12), 2
    assert pack_by_tokens([3, 9, 2, 50, 4, 4], budget=12) == [[3], [1], [4, 5, 0], [2]]
    assert pack_by_tokens([], budget=12) == []
    with pytest.raises(ValueError, match="at least 1"):
        pack_by_tokens([1], budget=0)


def test_pack_by_tokens_keeps_every_index_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, size=500).tolist()
    batches = pack_by_tokens(lengths, budget=512)
    assert sorted(chain(*batches)) == list(range(500))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 512 for batch in batches)


def test_whole_groups_of_unlike_sizes_keep_their_padded_batch_within_the_budget() -> None:
    lengths, group_R = [160] * 2 + [20] * 16, np.array([0] * 2 + [1] * 16)
    apart = [[0, 1], list(range(2, 18))]  # together 18 x 160 tokens
    assert cut_rows(lengths, group_R, budget=640, whole_groups=True) == apart
    assert cut_rows(lengths, group_R, budget=18 * 160, whole_groups=True) == [list(range(18))]
    draw = np.random.default_rng(0)
    group_R = np.repeat(np.arange(60), draw.integers(1, 9, size=60))
    lengths = draw.integers(1, 60, size=len(group_R)).tolist()
    batches = cut_rows(lengths, group_R, budget=512, whole_groups=True)
    assert sorted(chain(*batches)) == list(range(len(lengths)))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 512 for batch in batches)
    assert sum(len(set(group_R[batch])) for batch in batches) == 60  # none is in two


def make_unlike(*sizes: int) -> list[Rendered]:
    """Return samples of which so many tokens are read, and no two begin alike."""
    return [Rendered(np.full(size + 1, token, dtype=np.int32), start=size) for token, size in enumerate(sizes)]


def test_no_micro_batch_of_trees_is_small_where_others_are_full() -> None:
    """By hand: 60 and 40 fit in 100 tokens and leave 40 alone; 60 and 80 are as many. Rows are left as they are: levelled, 10 would be padded to 30."""
    trees = make_unlike(60, 40, 40)
    assert cut_trees(trees, np.arange(3), budget=100, whole_groups=False) == [[0], [1, 2]]
    assert cut_rows([30, 30, 30, 10], np.arange(4), budget=90, whole_groups=False) == [[0, 1, 2], [3]]
    assert cut_rows([30, 30, 30, 10], np.arange(4), budget=90, whole_groups=False, ranks=2) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("budget", "ranks", "batches"), [(144, 1, 1), (144, 2, 2), (72, 1, 2), (72, 3, 3), (72, 4, 4), (14_400, 4, 4), (14_400, 12, 12), (144, 20, 12)])  # fmt: skip
def test_a_step_within_one_budget_is_work_for_all_ranks(budget: int, ranks: int, batches: int) -> None:
    """Twelve samples of 132 tokens: one micro-batch, or two of 72; as many as there are ranks, and never more than there are samples."""
    lengths = [10, 11, 12] * 4
    trees = make_unlike(*lengths)
    for micros in (
        cut_trees(trees, np.arange(12), budget=budget, whole_groups=False, ranks=ranks),
        cut_rows(lengths, np.arange(12), budget=budget, whole_groups=False, ranks=ranks),
        cut_rows(lengths, np.arange(12), budget=budget, whole_groups=True, ranks=ranks),
    ):
        assert len(micros) == batches and sorted(chain(*micros)) == list(range(12))
        assert max(map(len, micros)) - min(map(len, micros)) <= 1


def test_trees_that_fill_their_budgets_are_left_as_they_fit() -> None:
    """By hand, 30 tokens in two budgets of 15: the largest into the emptiest would give 17 and 13."""
    trees, lone = make_unlike(8, 7, 6, 5, 4), [Family((place,), 0) for place in range(5)]
    assert first_fit((8, 7, 6, 5, 4), budget=15, families=lone) == [[0, 1], [2, 3, 4]]
    assert spread((8, 7, 6, 5, 4), count=2, families=lone) == [[0, 3, 4], [1, 2]]
    assert cut_trees(trees, np.arange(5), budget=15, whole_groups=False) == [[0, 1], [2, 3, 4]]
    assert cut_trees(trees, np.arange(5), budget=17, whole_groups=False) == [[0, 3, 4], [1, 2]]


@pytest.mark.parametrize(("num_rows", "sizes"), [(12, [4, 4, 4]), (10, [4, 4, 2]), (9, [4, 5]), (3, [3]), (1, [1])])
def test_last_batch_is_kept_from_half_on_and_merged_below(num_rows: int, sizes: list[int]) -> None:
    steps = plan_steps(num_rows, batch_prompts=4, epochs=2, seed=3)
    assert [len(step) for step in steps] == sizes * 2
    first, second = steps[: len(sizes)], steps[len(sizes) :]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(num_rows))


def test_plan_depends_on_seed_and_epoch_alone() -> None:
    plan = plan_steps(40, batch_prompts=8, epochs=2, seed=1)
    assert plan == plan_steps(40, batch_prompts=8, epochs=2, seed=1)
    assert plan[:5] == plan_steps(40, batch_prompts=8, epochs=1, seed=1)
    assert plan[:5] != plan[5:]
    assert plan != plan_steps(40, batch_prompts=8, epochs=2, seed=2)


def test_digest_keeps_parts_apart() -> None:
    assert digest_plan(["ab", "c"]) != digest_plan(["a", "bc"])
    assert digest_plan(["ab", b"c"]) == digest_plan([b"ab", "c"])


def test_collate_cell_by_cell() -> None:
    samples = [
        Rendered(ids_T=np.array([5, 6, 7, 8], dtype=np.int32), start=2),
        Rendered(ids_T=np.array([9], dtype=np.int32), start=1),
        Rendered(ids_T=np.array([1, 2, 3], dtype=np.int32), start=2),
    ]
    micro = collate([samples[2], samples[0]], device=torch.device("cpu"))
    assert micro.ids_BT.tolist() == [[1, 2, 0], [5, 6, 7]]  # what comes last predicts nothing
    # token 3 is predicted at 1; 7 and 8 in the second row at 1 and 2
    assert micro.predictor_P.tolist() == [1, 3 + 1, 3 + 2]
    assert micro.target_P.tolist() == [3, 7, 8]
    assert (micro.trained, micro.num_tokens) == ((1, 2), 5)
