"""Permutation and sampler: bijection, purity, passes, legal cuts."""

from __future__ import annotations

import random
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from data_helpers import corpus_of, write_dataset
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.data.indexed_dataset import IndexedDataset
from megatron_sip.data.permutation import permute, unpermute
from megatron_sip.data.sampler import PrefixSuffixSampler

VOCAB = 100
EOD = 1
WORD_STARTS = np.arange(VOCAB) % 3 == 0
SETTINGS = {"prefix_tokens": 10, "min_prefix_tokens": 4, "suffix_tokens": 6, "seed": 7}


def make(prefix: Path, documents: list[list[int]], *, append_eod: bool = True) -> IndexedDataset:
    whole = [[*d, EOD] for d in documents] if append_eod else documents
    return write_dataset(prefix, whole, vocab_size=VOCAB, append_eod=append_eod)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    draw = random.Random(0)
    documents = [[draw.randrange(2, VOCAB) for _ in range(n)] for n in range(4, 64)]
    return make(tmp_path_factory.mktemp("sampler") / "d", documents)


def sampler(dataset: IndexedDataset, **changes: int) -> PrefixSuffixSampler:
    settings = SETTINGS | changes
    corpus = corpus_of(
        dataset, min_tokens=settings["min_prefix_tokens"] + settings["suffix_tokens"]
    )
    return PrefixSuffixSampler(corpus, **settings, word_starts=WORD_STARTS, eod=EOD)


def plain(sample: object) -> list[object]:
    return [x.tolist() if isinstance(x, np.ndarray) else x for x in astuple(sample)]  # pyright: ignore[reportArgumentType]


@given(size=st.integers(1, 600), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection_of_every_size(size: int, key: int) -> None:
    images = [permute(i, size=size, key=key) for i in range(size)]
    assert sorted(images) == list(range(size))
    assert [unpermute(image, size=size, key=key) for image in images] == list(range(size))


def test_permutation_stays_in_range_for_huge_sizes_and_refuses_what_is_outside() -> None:
    assert all(0 <= permute(i, size=10**15, key=3) < 10**15 for i in range(50))
    for index, size in ((-1, 5), (5, 5), (0, 0), (0, 2**62 + 1)):
        with pytest.raises(ValueError, match="0 <= value < size"):
            permute(index, size=size, key=0)


def test_permutations_of_different_keys_agree_in_about_one_place() -> None:
    orders = [[permute(i, size=500, key=key) for i in range(500)] for key in range(40)]
    agreements = [sum(a == b for a, b in zip(orders[0], o, strict=True)) for o in orders[1:]]
    assert np.mean(agreements) < 2.0  # 1 is expected of unrelated permutations
    assert max(abs(np.corrcoef(o, range(500))[0, 1]) for o in orders) < 0.2


def test_small_permutations_are_uniform_over_keys() -> None:
    counts = np.zeros((5, 5))
    for key in range(2000):
        for i in range(5):
            counts[i, permute(i, size=5, key=key)] += 1
    assert np.abs(counts / 2000 - 0.2).max() < 0.05  # standard error 0.009


def test_sample_i_does_not_depend_on_order_or_on_the_sampler_object(
    dataset: IndexedDataset,
) -> None:
    forward = {i: plain(sampler(dataset)[i]) for i in range(120)}
    shared, order = sampler(dataset), list(range(120))
    random.Random(1).shuffle(order)
    for i in order:
        assert plain(shared[i]) == forward[i]


def test_the_sample_order_is_frozen(dataset: IndexedDataset) -> None:
    """A change here changes every run: say so in the changelog."""
    samples = [sampler(dataset)[i] for i in (0, 1, 2, 1000)]
    assert [(s.document_id, s.cut) for s in samples] == [(31, 22), (11, 7), (57, 29), (57, 4)]


def test_prefix_and_suffix_are_contiguous_in_the_document(dataset: IndexedDataset) -> None:
    for i in range(200):
        sample = sampler(dataset)[i]
        tokens = dataset.document(sample.document_id)
        joined = np.concatenate([sample.prefix_ids, sample.suffix_ids])
        start = sample.cut - len(sample.prefix_ids)
        assert joined.tolist() == tokens[start : sample.cut + 6].tolist()
        assert joined.dtype == np.int32
        assert sample.sample_id == i
        assert len(sample.suffix_ids) == 6
        assert len(sample.prefix_ids) == min(10, sample.cut) >= 4
        assert EOD not in joined


def test_every_eligible_document_comes_once_a_pass_in_changing_order(
    dataset: IndexedDataset,
) -> None:
    source = sampler(dataset)
    eligible = [i for i, n in enumerate(dataset.document_lengths()) if n - 1 >= 10]
    size = source.num_eligible
    assert size == len(eligible) == 54
    passes = [[source[p * size + j].document_id for j in range(size)] for p in range(3)]
    assert [sorted(p) for p in passes] == [eligible] * 3
    assert passes[0] != passes[1] != passes[2] != passes[0]
    cuts = {(s.document_id, s.cut) for s in (source[i] for i in range(20 * size))}
    assert len(cuts) > 3 * size  # each pass cuts anew


def test_cuts_are_at_word_starts_and_reach_every_legal_position(tmp_path: Path) -> None:
    tokens = [2] * 6 + [3, 2, 3, 2, 3, 2] + [2] * 4 + [3] * 2  # 18 tokens; 3 starts a word
    source = sampler(make(tmp_path / "d", [tokens]))
    cuts = [source[i].cut for i in range(600)]
    assert set(cuts) == {6, 8, 10}  # 16 and 17 leave fewer than 6 tokens
    assert all(abs(cuts.count(cut) / 600 - 1 / 3) < 0.08 for cut in set(cuts))  # 4 errors


def test_first_and_last_legal_positions_are_reached_without_and_with_eod(tmp_path: Path) -> None:
    for append_eod in (True, False):
        source = sampler(make(tmp_path / f"{append_eod}", [[3] * 12], append_eod=append_eod))
        assert {source[i].cut for i in range(60)} == {4, 5, 6}


def test_a_document_without_word_starts_is_cut_anywhere_legal(tmp_path: Path) -> None:
    source = sampler(make(tmp_path / "d", [[2] * 12]))
    assert {source[i].cut for i in range(60)} == {4, 5, 6}


def test_seeds_give_different_samples(dataset: IndexedDataset) -> None:
    one, other = sampler(dataset, seed=1), sampler(dataset, seed=2)
    same = sum(one[i].document_id == other[i].document_id for i in range(54))
    assert same < 8


def test_a_dataset_whose_ids_lie_below_a_smaller_size_is_legal(dataset: IndexedDataset) -> None:
    corpus = corpus_of(dataset, min_tokens=10)
    more = np.concatenate([WORD_STARTS, np.zeros(5, bool)])
    source = PrefixSuffixSampler(corpus, **SETTINGS, word_starts=more, eod=EOD)
    assert plain(source[3]) == plain(sampler(dataset)[3])


def test_errors_name_numbers_and_remedy(dataset: IndexedDataset) -> None:
    with pytest.raises(ValueError, match=r"none of 60 .*suffix_tokens = 94 tokens"):
        sampler(dataset, suffix_tokens=90)
    with pytest.raises(ValueError, match=r"min_prefix_tokens 11 .*prefix_tokens 10"):
        sampler(dataset, min_prefix_tokens=11)
    with pytest.raises(ValueError, match="starts at 0"):
        sampler(dataset)[-1]
    corpus = corpus_of(dataset, min_tokens=9)
    with pytest.raises(ValueError, match="has eod 1 and 100 pieces"):
        PrefixSuffixSampler(corpus, **SETTINGS, word_starts=WORD_STARTS, eod=2)
    few = WORD_STARTS[: VOCAB - 1]  # an earlier version adopted with a padded size
    with pytest.raises(ValueError, match=r"100 pieces, .* 99 pieces; .* or adopt the data anew"):
        PrefixSuffixSampler(corpus, **SETTINGS, word_starts=few, eod=EOD)
    with pytest.raises(ValueError, match="documents of 9 tokens"):
        PrefixSuffixSampler(corpus, **SETTINGS, word_starts=WORD_STARTS, eod=EOD)
