"""The criterion that asks nobody, and the frequencies it reads."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from judge_helpers import likelihood_reply, make_model_folder, make_pool, scripted_server, served
from pool_helpers import candidate
from pool_helpers import pool as pool_of
from test_data_indexed_dataset import write

from megatron_sip import config
from megatron_sip.data.frequencies import PairFrequencies, pair_frequencies
from megatron_sip.judge.cache import Cache
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.rarity import Rarity

EOD = 1
LIKELIHOOD = config.LikelihoodCriterion(form="likelihood", name="l", server="j")
RARITY = config.RarityCriterion(form="rarity", name="r", weight=0.5)
FREQUENCIES = PairFrequencies(np.array([3 * 600 + 4, 4 * 600 + 3]), np.array([6, 2]), 600)


def test_pairs_are_counted_inside_documents(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", [[5, 6, 5, 6, EOD], [6, 5, EOD], [7]], vocab_size=8)
    found = pair_frequencies(dataset)
    pairs = {
        (int(c) // 8, int(c) % 8): int(n) for c, n in zip(found.codes, found.counts, strict=True)
    }
    assert pairs == {(5, 6): 2, (6, 5): 2, (6, EOD): 1, (5, EOD): 1}
    shares = np.exp(found.log_share(np.array([5, 6, EOD, 7])))
    np.testing.assert_allclose(shares, [2 / 6, 1 / 6, 0.5 / 6], rtol=1e-12)


def test_codes_do_not_overflow_with_a_large_vocabulary() -> None:
    last = 200_000
    code = (last - 1) * last + last - 1
    frequencies = PairFrequencies(np.array([0, code]), np.array([1, 3]), last)
    tokens = np.array([last - 1, last - 1], dtype=np.int32)
    assert np.exp(frequencies.log_share(tokens)) == pytest.approx([0.75])


def test_a_large_dataset_is_read_at_even_steps_and_no_further(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", [[token] * 10 for token in range(8)], vocab_size=8)
    found = pair_frequencies(dataset, max_tokens=40)
    assert (found.codes // 8).tolist() == [0, 2, 4, 6] and found.counts.tolist() == [9] * 4
    found = pair_frequencies(dataset, max_tokens=15)
    assert (found.codes // 8).tolist() == [0, 6] and found.counts.tolist() == [9, 4]


def test_rarity_is_minus_the_mean_log_share_and_the_end_counts_for_nothing() -> None:
    rarity = Rarity(FREQUENCIES, eod=EOD)
    expected = -(math.log(6 / 8) + math.log(2 / 8) + math.log(0.5 / 8)) / 3
    assert rarity.score(candidate([3, 4, 3, 9])) == pytest.approx(expected, abs=1e-12)
    assert rarity.score(candidate([3, 4, 3, 9, EOD])) == pytest.approx(expected, abs=1e-12)
    assert rarity.score(candidate([3, EOD])) is None


def judge(url: str, folder: Path, rarity: Rarity | None) -> Judge:
    criteria = (LIKELIHOOD, RARITY)
    return Judge(
        criteria,
        servers={"j": served(url, folder)},
        cache=Cache(folder / "cache"),
        settings=config.Judge(criteria=criteria, cache_dir=folder / "cache"),
        prefix_text=lambda sample, num: "prefix",
        rarity=rarity,
    )


def test_it_enters_the_reward_with_its_weight_and_is_no_question(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path)
    pool = pool_of(
        make_pool(["a b", "c d"]).sample,
        candidate([3, 4], text="a b"),
        candidate([5, 3], text="c d"),
    )
    rarity = Rarity(FREQUENCIES, EOD)
    with scripted_server(lambda path, body: likelihood_reply(body, -2.0)) as url:
        (rewards,), (verdicts,), counts = judge(url, folder, rarity).judge_pools([pool], seed=3)
    rare = [rarity.score(c) for c in pool.candidates]
    np.testing.assert_allclose(rewards.by_criterion["r"], rare, rtol=1e-6)
    np.testing.assert_allclose(rewards.total, -2.0 + 0.5 * np.array(rare), rtol=1e-6)
    assert counts["verdicts"] == 2 and counts["missing"] == 0
    assert [v.criterion for v in verdicts] == ["l", "l", "r", "r"]


def test_without_frequencies_it_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="token frequencies"):
        judge("http://127.0.0.1:9", make_model_folder(tmp_path), None)
