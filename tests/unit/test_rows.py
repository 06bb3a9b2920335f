"""Rows: labels are tokens shifted by one, segments stand exactly on their candidate's labels."""

from __future__ import annotations

import pytest
import torch
from pool_helpers import candidate, pool, sample

from megatron_sip.objectives.terms import ORIGINAL_SUFFIX, PREFIX
from megatron_sip.rows import make_micro_batches, make_rows, row_length
from megatron_sip.types import ROLES, Pick

PAD = 99
TARGET = Pick(ORIGINAL_SUFFIX, "target", 0.0, 1.0)
POOL = pool(sample(7, (1, 2, 3), (4, 5)), candidate((6, 7, 8)), candidate((9,), "rewrite"))
PAIR = (Pick(0, "chosen", 0.0, 1.0), Pick(1, "rejected", 0.0, 1.0))


def test_row_holds_prefix_and_candidate_less_the_last_token_with_labels_shifted_by_one() -> None:
    rows = make_rows([POOL], [PAIR], length=8, pad=PAD)
    assert rows.tokens.tolist() == [
        [1, 2, 3, 6, 7, PAD, PAD, PAD],
        [1, 2, 3, PAD, PAD, PAD, PAD, PAD],
    ]
    assert rows.labels.tolist() == [
        [2, 3, 6, 7, 8, PAD, PAD, PAD],
        [2, 3, 9, PAD, PAD, PAD, PAD, PAD],
    ]
    assert rows.position_ids.tolist() == [list(range(8))] * 2
    assert rows.reference_logprobs.eq(0).all() and rows.reference_logprobs.shape == (2, 8)


def test_segment_stands_exactly_where_the_candidates_tokens_are_labels() -> None:
    rows = make_rows([POOL], [PAIR], length=8, pad=PAD)
    assert rows.segment_ids.tolist() == [
        [-1, -1, 0, 0, 0, -1, -1, -1],
        [-1, -1, 1, -1, -1, -1, -1, -1],
    ]
    assert rows.labels[rows.segment_ids == 0].tolist() == [6, 7, 8]
    assert rows.labels[rows.segment_ids == 1].tolist() == [9]
    assert rows.pairs.tolist() == [[0, 1]]
    assert [ROLES[r] for r in rows.roles] == ["chosen", "rejected"]
    assert rows.policy_versions.tolist() == [3, -1]


def test_engine_logprobs_stand_on_the_labels_they_belong_to() -> None:
    rows = make_rows([POOL], [PAIR], length=8, pad=PAD)
    torch.testing.assert_close(
        rows.rollout_logprobs,
        torch.tensor([[0, 0, -0.1, -0.2, -0.3, 0, 0, 0], [0.0] * 8]),
    )


def test_prefix_is_a_segment_of_the_pools_first_row_without_its_first_token() -> None:
    picks = (*PAIR, TARGET, Pick(PREFIX, "prefix", 0.0, 1.0))
    rows = make_rows([POOL, POOL], [picks, picks], length=6, pad=PAD)
    assert rows.tokens.shape == (6, 6)
    assert rows.segment_ids[:3].tolist() == [
        [3, 3, 0, 0, 0, -1],
        [-1, -1, 1, -1, -1, -1],
        [-1, -1, 2, 2, -1, -1],
    ]
    assert rows.labels[rows.segment_ids == 3].tolist() == [2, 3]
    assert rows.segment_ids[3].tolist() == [7, 7, 4, 4, 4, -1]
    assert rows.pairs.tolist() == [[0, 1], [4, 5]]
    assert rows.group_ids.tolist() == [0] * 4 + [1] * 4
    assert [ROLES[r] for r in rows.roles] == ["chosen", "rejected", "target", "prefix"] * 2
    assert rows.labels[rows.segment_ids == 2].tolist() == [4, 5]


def test_prefix_of_one_token_has_an_empty_segment() -> None:
    one = pool(sample(1, (5,), (6,)))
    rows = make_rows([one], [(TARGET, Pick(PREFIX, "prefix", 0.0, 1.0))], length=3, pad=PAD)
    assert rows.segment_ids.tolist() == [[0, -1, -1]]
    assert rows.weights.tolist() == [1.0, 1.0]


def test_padding_is_never_scored_and_every_scored_label_is_a_real_token() -> None:
    rows = make_rows([POOL], [(*PAIR, TARGET)], length=32, pad=PAD)
    assert not (rows.labels[rows.segment_ids >= 0] == PAD).any()
    assert (rows.segment_ids >= 0).sum() == 3 + 1 + 2
    assert (rows.segment_ids[rows.labels == PAD] == -1).all()


def test_two_pairs_of_a_pool_are_each_chosen_then_rejected() -> None:
    many = pool(sample(), *(candidate((i, i)) for i in range(4)))
    picks = [Pick(i, role, 0.0, 1.0) for i, role in
             ((3, "chosen"), (0, "rejected"), (2, "chosen"), (1, "rejected"))]  # fmt: skip
    rows = make_rows([many], [picks], length=4, pad=PAD)
    assert rows.pairs.tolist() == [[0, 1], [2, 3]]
    assert rows.labels[:, 2].tolist() == [3, 0, 2, 1]


def test_weights_and_advantages_follow_the_picks() -> None:
    picks = (Pick(0, "chosen", 0.5, 0.0), Pick(1, "rejected", -0.5, 0.0))
    rows = make_rows([POOL], [picks], length=8, pad=PAD)
    assert rows.weights.tolist() == [0.0, 0.0] and rows.advantages.tolist() == [0.5, -0.5]
    assert rows.tokens.shape[0] == 2


def test_row_that_just_fits_is_made_and_one_token_more_is_an_error() -> None:
    assert make_rows([POOL], [PAIR], length=5, pad=PAD).tokens.shape == (2, 5)
    with pytest.raises(ValueError, match=r"sample 7: prefix 3 .* candidate 3 .* row of 4"):
        make_rows([POOL], [PAIR], length=4, pad=PAD)


@pytest.mark.parametrize(
    ("prefix", "suffix", "multiple", "length"),
    [(3, 2, 1, 4), (3, 2, 16, 16), (9, 8, 16, 16), (9, 9, 16, 32), (64, 32, 32, 96)],
)
def test_row_length_is_rounded_up_to_the_multiple(
    prefix: int, suffix: int, multiple: int, length: int
) -> None:
    assert row_length(prefix, suffix, multiple) == length


def test_micro_batches_cut_between_pools_and_number_segments_anew() -> None:
    batches = make_micro_batches(
        [POOL] * 6, [PAIR] * 6, micro_batch_size=2, length=8, multiple=1, pad=PAD, layout="padded"
    )
    assert [len(b.tokens) for b in batches] == [4, 4, 4]
    assert all(b.pairs[0].tolist() == [0, 1] for b in batches)
    whole = make_rows([POOL] * 6, [PAIR] * 6, length=8, pad=PAD)
    assert torch.equal(torch.cat([b.labels for b in batches]), whole.labels)


def test_micro_batches_of_uneven_pools_have_one_shape() -> None:
    three = (*PAIR, TARGET)
    for layout, shape in (("padded", (3, 8)), ("shared_prefix", (1, 8))):
        batches = make_micro_batches(
            [POOL] * 2, [PAIR, three], micro_batch_size=1, length=8, multiple=4, pad=PAD,
            layout=layout,
        )  # fmt: skip
        assert [tuple(b.tokens.shape) for b in batches] == [shape, shape]
        assert batches[0].segment_ids.ge(0).sum() == 4  # an empty row scores nothing


def test_pool_is_one_row_of_its_prefix_and_branches() -> None:
    picks = (*PAIR, TARGET, Pick(PREFIX, "prefix", 0.0, 1.0))
    rows = make_rows([POOL], [picks], length=9, pad=PAD, layout="shared_prefix")
    assert rows.tokens.tolist() == [[1, 2, 3, 6, 7, 3, 3, 4, PAD]]
    assert rows.labels.tolist() == [[2, 3, 6, 7, 8, 9, 4, 5, PAD]]
    assert rows.position_ids[0, :8].tolist() == [0, 1, 2, 3, 4, 2, 2, 3]
    assert rows.branch_ids.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3, -1]]
    assert rows.segment_ids.tolist() == [[3, 3, 0, 0, 0, 1, 2, 2, -1]]
    assert rows.rollout_logprobs[0, 2:5].tolist() == pytest.approx([-0.1, -0.2, -0.3])
    assert rows.pairs.tolist() == [[0, 1]]


def test_both_layouts_score_the_same_segments() -> None:
    picks = (*PAIR, TARGET, Pick(PREFIX, "prefix", 0.0, 1.0))
    padded = make_rows([POOL, POOL], [picks, PAIR], length=8, pad=PAD)
    shared = make_rows([POOL, POOL], [picks, PAIR], length=9, pad=PAD, layout="shared_prefix")
    assert not padded.branch_ids.numel()
    for name in ("roles", "weights", "group_ids", "policy_versions", "pairs"):
        assert torch.equal(getattr(padded, name), getattr(shared, name)), name
    for m in range(len(padded.roles)):
        for name in ("tokens", "labels", "position_ids", "rollout_logprobs"):
            a, b = (getattr(r, name)[r.segment_ids == m] for r in (padded, shared))
            assert torch.equal(a, b), (m, name)


def test_row_that_shares_its_prefix_and_is_too_short_names_the_sample() -> None:
    with pytest.raises(ValueError, match="sample 7"):
        make_rows([POOL], [(*PAIR, TARGET)], length=7, pad=PAD, layout="shared_prefix")
