"""The criterion that asks nobody, and the frequencies it reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_helpers import corpus_of, write_dataset
from judge_helpers import likelihood_reply, make_model_folder, make_pool, scripted_server, served
from pool_helpers import candidate
from pool_helpers import pool as pool_of

from megatron_sip import config_judge
from megatron_sip.data.frequencies import PairFrequencies, pair_frequencies
from megatron_sip.judge.cache import Cache
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.novelty import Novelty

EOD = 1
LIKELIHOOD = config_judge.LikelihoodCriterion(form="likelihood", name="l", server="j")
NOVELTY = config_judge.NoveltyCriterion(form="novelty", name="r", weight=0.5)
FREQUENCIES = PairFrequencies(np.array([3 * 600 + 4, 4 * 600 + 3]), np.array([6, 2]), 600)


def test_pairs_are_counted_inside_documents(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", [[5, 6, 5, 6, EOD], [6, 5, EOD], [7]], vocab_size=8)
    found = pair_frequencies(corpus_of(dataset))
    pairs = {
        (int(c) // 8, int(c) % 8): int(n) for c, n in zip(found.codes, found.counts, strict=True)
    }
    assert pairs == {(5, 6): 2, (6, 5): 2, (6, EOD): 1, (5, EOD): 1}
    shares = found.share(np.array([5, 6, EOD, 7]))
    np.testing.assert_allclose(shares, [2 / 6, 1 / 6, 0], rtol=1e-12)


def test_codes_do_not_overflow_with_a_large_vocabulary() -> None:
    last = 200_000
    code = (last - 1) * last + last - 1
    frequencies = PairFrequencies(np.array([0, code]), np.array([1, 3]), last)
    tokens = np.array([last - 1, last - 1], dtype=np.int32)
    assert frequencies.share(tokens) == pytest.approx([0.75])


def test_a_pair_with_an_id_behind_the_vocabulary_was_never_counted() -> None:
    share = FREQUENCIES.share(np.array([2, 600 + 4, 3, 4]))  # 2 * 600 + 604 is the code of (3, 4)
    np.testing.assert_array_equal(share, [0, 0, 6 / 8])


def test_a_large_dataset_is_read_at_even_steps_and_no_further(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", [[token] * 10 for token in range(8)], vocab_size=8)
    found = pair_frequencies(corpus_of(dataset), max_tokens=40)
    assert (found.codes // 8).tolist() == [0, 2, 4, 6] and found.counts.tolist() == [9] * 4
    found = pair_frequencies(corpus_of(dataset), max_tokens=15)
    assert (found.codes // 8).tolist() == [0, 6] and found.counts.tolist() == [9, 4]


def test_novelty_is_the_mean_chance_that_others_lack_a_pair_end_of_text_left_out() -> None:
    novelty = Novelty(FREQUENCIES, eod=EOD)
    expected = ((1 - 6 / 8) ** 3 + (1 - 2 / 8) ** 3 + 1.0) / 3
    assert novelty.score(candidate([3, 4, 3, 9]), pairs=3) == pytest.approx(expected, abs=1e-12)
    assert novelty.score(candidate([3, 4, 3, 9, EOD]), pairs=3) == pytest.approx(
        expected, abs=1e-12
    )
    assert novelty.score(candidate([3, EOD]), pairs=3) is None


def test_it_is_the_expectation_of_what_a_text_adds_to_the_distinct_pairs_of_others() -> None:
    """Against drawing: 20 pairs with the frequencies of `FREQUENCIES`, 4,000 times."""
    generator = np.random.default_rng(0)
    others = generator.choice(2, size=(4000, 20), p=[0.75, 0.25])  # 0: (3, 4), 1: (4, 3)
    new = [1 - (others == pair).any(axis=1) for pair in (0, 1)]
    drawn = np.mean([new[0], new[1], np.ones(4000)], axis=0).mean()
    found = Novelty(FREQUENCIES, eod=EOD).score(candidate([3, 4, 3, 9]), pairs=20)
    assert found == pytest.approx(drawn, abs=2e-3)


def judge(url: str, folder: Path, novelty: Novelty | None) -> Judge:
    criteria = (LIKELIHOOD, NOVELTY)
    return Judge(
        criteria,
        servers={"j": served(url, folder)},
        cache=Cache(folder / "cache"),
        settings=config_judge.Judge(criteria=criteria, cache_dir=folder / "cache"),
        prefix_text=lambda sample, num: "prefix",
        suffix_text=lambda sample: "suffix",
        novelty=novelty,
    )


def test_it_enters_the_reward_with_its_weight_and_is_no_question(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path)
    pool = pool_of(
        make_pool(["a b", "c d"]).sample,
        candidate([3, 4], text="a b"),
        candidate([5, 3], text="c d"),
    )
    novelty = Novelty(FREQUENCIES, EOD)
    with scripted_server(lambda path, body: likelihood_reply(body, -2.0)) as url:
        (rewards,), (verdicts,), counts = judge(url, folder, novelty).judge_pools([pool], seed=3)
    new = [novelty.score(c, pairs=4096) for c in pool.candidates]
    np.testing.assert_allclose(rewards.by_criterion["r"], new, rtol=1e-6)
    np.testing.assert_allclose(rewards.total, -2.0 + 0.5 * np.array(new), rtol=1e-6)
    assert counts["verdicts"] == 2 and counts["missing"] == 0
    assert [v.criterion for v in verdicts] == ["l", "l", "r", "r"]


def test_without_frequencies_it_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="token frequencies"):
        judge("http://127.0.0.1:9", make_model_folder(tmp_path), None)
