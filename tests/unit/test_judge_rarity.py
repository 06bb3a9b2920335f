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
from megatron_sip.data.frequencies import log_frequencies
from megatron_sip.judge.cache import Cache
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.rarity import Rarity

EOD = 1
SHARE = np.log(np.array([0.5, 0.1, 0.25, 0.15]))
LIKELIHOOD = config.LikelihoodCriterion(form="likelihood", name="l", server="j")
RARITY = config.RarityCriterion(form="rarity", name="r", weight=0.5)


def test_shares_count_each_token_once_more_than_it_occurs(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", [[5, 6, 5, EOD], [5, EOD]], vocab_size=8)
    expected = np.array([1, 3, 1, 1, 1, 4, 2, 1]) / 14
    np.testing.assert_allclose(np.exp(log_frequencies(dataset)), expected, rtol=1e-12)


def test_a_large_dataset_is_read_at_even_steps_and_no_further(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", [[token] * 10 for token in range(8)], vocab_size=8)
    count = np.exp(log_frequencies(dataset, max_tokens=40)) * (8 + 40)
    np.testing.assert_allclose(count, [11, 1] * 4)
    count = np.exp(log_frequencies(dataset, max_tokens=15)) * (8 + 15)
    np.testing.assert_allclose(count.sum(), 23)
    assert np.round(count).tolist() == [11, 1, 1, 1, 1, 1, 6, 1]


def test_rarity_is_minus_the_mean_log_share_and_the_end_counts_for_nothing() -> None:
    rarity = Rarity(SHARE, eod=EOD)
    expected = -(math.log(0.5) + math.log(0.25)) / 2
    assert rarity.score(candidate([0, 2])) == pytest.approx(expected, abs=1e-12)
    assert rarity.score(candidate([0, 2, EOD])) == pytest.approx(expected, abs=1e-12)
    assert rarity.score(candidate([EOD])) is None


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
        make_pool(["a b", "c d"]).sample, candidate([3, 4], text="a b"), candidate([5], text="c d")
    )
    shares = np.linspace(-9.0, -1.0, 600)
    with scripted_server(lambda path, body: likelihood_reply(body, -2.0)) as url:
        (rewards,), (verdicts,), counts = judge(url, folder, Rarity(shares, 599)).judge_pools(
            [pool], seed=3
        )
    rare = [-shares[c.token_ids].mean() for c in pool.candidates]
    np.testing.assert_allclose(rewards.by_criterion["r"], rare, rtol=1e-6)
    np.testing.assert_allclose(rewards.total, -2.0 + 0.5 * np.array(rare), rtol=1e-6)
    assert counts["verdicts"] == 2 and counts["missing"] == 0
    assert [v.criterion for v in verdicts] == ["l", "l", "r", "r"]


def test_without_frequencies_it_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="token frequencies"):
        judge("http://127.0.0.1:9", make_model_folder(tmp_path), None)
