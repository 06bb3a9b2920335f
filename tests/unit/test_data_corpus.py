"""Corpora of many files, masks, blends: one global order, whatever reads it."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from data_helpers import write_dataset
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.config import BlendPart
from megatron_sip.data import blended_corpus
from megatron_sip.data.blend import (
    WEIGHT_SUM,
    Blend,
    counts_of_epochs,
    counts_of_weights,
)
from megatron_sip.data.blended_corpus import BlendedCorpus, open_corpus
from megatron_sip.data.corpus import Corpus
from megatron_sip.data.document_mask import load_mask, mask_of
from megatron_sip.data.manifest import load_manifest
from megatron_sip.data.sample_reader import SampleReader
from megatron_sip.data.sampler import Origin, PrefixSuffixSampler
from megatron_sip.parallel import shard

VOCAB, EOD, MIN_TOKENS = 100, 1, 10
WORD_STARTS = np.arange(VOCAB) % 3 == 0


def documents(seed: int, count: int) -> list[list[int]]:
    """Some long enough, some not; each ends with its end-of-document id."""
    draw = random.Random(seed)
    lengths = [draw.choice((4, 9, 10, 14, 30)) for _ in range(count)]
    return [[*(draw.randrange(2, VOCAB) for _ in range(n)), EOD] for n in lengths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets a0 to a4 and b0, of which a0's and b0's own masks fit MIN_TOKENS."""
    path = tmp_path_factory.mktemp("corpus")
    for seed, name in enumerate(("a0", "a1", "a2", "a3", "a4", "b0")):
        fits = MIN_TOKENS if name in ("a0", "b0") else 7
        write_dataset(path / name, documents(seed, 40 + seed), vocab_size=VOCAB, min_tokens=fits)
    return path


def opened(source: Path | tuple[BlendPart, ...]) -> BlendedCorpus:
    return open_corpus(source, min_tokens=MIN_TOKENS, cache_dir=None)


def sampler(corpus: BlendedCorpus, *, seed: int = 7) -> PrefixSuffixSampler:
    return PrefixSuffixSampler(
        corpus, prefix_tokens=8, min_prefix_tokens=4, suffix_tokens=6, seed=seed,
        word_starts=WORD_STARTS, eod=EOD,
    )  # fmt: skip


@given(st.lists(st.booleans(), max_size=3000))
def test_rank_and_select_agree_with_counting(members: list[bool]) -> None:
    mask = mask_of(np.array(members, bool), min_tokens=1)
    chosen = [i for i, member in enumerate(members) if member]
    assert [mask.select(k) for k in range(mask.num_selected)] == chosen
    ranks = np.concatenate(([0], np.cumsum(members))).astype(int)
    assert [mask.rank(i) for i in range(len(members) + 1)] == ranks.tolist()
    assert mask.members().tolist() == members
    with pytest.raises(ValueError, match=r"must be in \[0"):
        mask.select(len(chosen))


def test_a_mask_is_read_back_and_damage_is_found(tmp_path: Path) -> None:
    members = np.random.default_rng(0).random(5000) < 0.05
    mask_of(members, min_tokens=3, rule="by chance").save(tmp_path / "m")
    found = load_mask(tmp_path / "m")
    assert found.members().tolist() == members.tolist()
    assert (found.header.rule, found.header.min_tokens) == ("by chance", 3)
    good = (tmp_path / "m").read_bytes()
    for spoiled, message in (
        (good[:-1], "has .* bytes, but 5000 documents need"),
        (good[:-100] + bytes([good[-100] ^ 1]) + good[-99:], "was altered"),
        (b"x" + good[1:], "does not begin a mask"),
        (good[:20] + b"?" + good[21:], "m: "),
        (b"", "does not begin a mask"),
    ):
        (tmp_path / "m").write_bytes(spoiled)
        with pytest.raises(ValueError, match=message):
            load_mask(tmp_path / "m")


def test_documents_of_many_files_are_one_sequence(folder: Path) -> None:
    corpus = opened(folder / "a*").parts[0]
    whole = [d for seed in range(5) for d in documents(seed, 40 + seed)]
    assert [corpus.document(i).tolist() for i in range(corpus.num_documents)] == whole
    eligible = [i for i, d in enumerate(whole) if len(d) - 1 >= MIN_TOKENS]
    assert [corpus.eligible_document(k) for k in range(corpus.num_eligible)] == eligible
    places = [corpus.place_of(i) for i in range(corpus.num_documents)]
    assert [p for p in places if p is not None] == list(range(len(eligible)))
    assert [i for i, p in enumerate(places) if p is not None] == eligible
    assert corpus.tokens == sum(map(len, whole))


def test_few_files_are_open_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blended_corpus, "OPEN_FILES", 4)
    parts = [BlendPart(prefix=str(folder / f"{name}*"), weight=1.0) for name in "ab"]
    corpus = opened(tuple(parts)).parts[0]
    order = list(range(corpus.num_documents))
    random.Random(0).shuffle(order)
    for i in order:
        corpus.document(i)
        assert len(corpus._open) <= 2


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 10**12))
def test_a_blend_is_a_bijection_that_keeps_order_and_shares(counts: list[int], far: int) -> None:
    blend, size = Blend(tuple(counts)), sum(counts)
    for start in (0, far):
        found = [blend.locate(i) for i in range(start, start + 2 * size)]
        assert [blend.index(*place) for place in found] == list(range(start, start + 2 * size))
        for part, count in enumerate(counts):
            own = [k for p, k in found if p == part]
            assert own == list(range(own[0], own[0] + 2 * count))
            had = blend.before(start)[part]
            assert abs(had - start * count / size) < len(counts)


def test_counts_follow_weights_and_epochs() -> None:
    assert counts_of_weights([2.0, 1.0, 1.0]) == (32768, 16384, 16384)
    thirds = counts_of_weights([1.0, 1.0, 1.0])
    assert sum(thirds) == WEIGHT_SUM and max(thirds) - min(thirds) == 1
    assert counts_of_epochs([2.0, 0.5], [10, 40]) == (20, 20)
    with pytest.raises(ValueError, match="less than one sample in 65536"):
        counts_of_weights([1e9, 1.0])
    with pytest.raises(ValueError, match=r"0.01 epochs of 10 .*less than one document"):
        counts_of_epochs([0.01], [10])


def test_epochs_pass_over_each_part_exactly_so_often(folder: Path) -> None:
    parts = (
        BlendPart(prefix=str(folder / "a*"), epochs=1.0),
        BlendPart(prefix=str(folder / "b0"), epochs=3.0),
    )
    corpus = opened(parts)
    order = sampler(corpus)
    uses = Counter((o.part, o.document) for o in map(order.origin, range(sum(corpus.counts))))
    assert set(uses.values()) == {1, 3}
    assert {use: n for use, n in uses.items() if n != (1, 3)[use[0]]} == {}
    assert sum(uses.values()) == corpus.parts[0].num_eligible + 3 * corpus.parts[1].num_eligible


def test_token_budgets_are_passes(folder: Path) -> None:
    tokens = 2.0 * sum(len(d) for d in documents(5, 45) if len(d) - 1 >= MIN_TOKENS)
    parts = (
        BlendPart(prefix=str(folder / "b0"), tokens=tokens),
        BlendPart(prefix=str(folder / "a0"), tokens=1000.0),
    )
    corpus = opened(parts)
    assert corpus.counts[0] == 2 * corpus.parts[0].num_eligible


def test_identity_names_what_differs(folder: Path) -> None:
    def identity(**changes: float | str) -> dict[str, str]:
        first = BlendPart(**({"prefix": str(folder / "a0"), "weight": 1.0} | changes))  # pyright: ignore
        return opened((first, BlendPart(prefix=str(folder / "b0"), weight=1.0))).identity("train")

    base = identity()
    assert set(base) == {"train, part 1", "train, part 2", "train, samples of each part"}
    for changes, key in (
        ({"weight": 2.0}, "train, samples of each part"),
        ({"prefix": str(folder / "a1")}, "train, part 1"),
    ):
        other = identity(**changes)
        assert {k for k in base if base[k] != other[k]} == {key}
    dataset = load_manifest(folder / "a0.manifest.json")
    assert opened(folder / "a0").identity("train") == {"train": dataset.data_digest}


def mask_file(prefix: Path, members: np.ndarray, *, name: str, min_tokens: int) -> None:
    digest = load_manifest(Path(f"{prefix}.manifest.json")).idx_xxh3_128
    mask = mask_of(members, min_tokens=min_tokens, rule="test", idx_xxh3_128=digest)
    mask.save(Path(f"{prefix}.{name}"))


@pytest.mark.parametrize("min_tokens", [1, MIN_TOKENS, 14])
def test_a_mask_and_the_length_both_hold(folder: Path, tmp_path: Path, min_tokens: int) -> None:
    whole = documents(9, 60)
    write_dataset(tmp_path / "d", whole, vocab_size=VOCAB, min_tokens=MIN_TOKENS)
    lengths = np.array([len(d) - 1 for d in whole])
    members = (np.arange(60) % 2 == 0) & (lengths >= min_tokens)
    mask_file(tmp_path / "d", members, name="even", min_tokens=min_tokens)
    part = BlendPart(prefix=str(tmp_path / "d"), mask="even", weight=1.0)
    corpus = opened((part,)).parts[0]
    chosen = np.flatnonzero(members & (lengths >= MIN_TOKENS)).tolist()
    assert [corpus.eligible_document(k) for k in range(corpus.num_eligible)] == chosen
    assert corpus.digest != opened(tmp_path / "d").parts[0].digest


def test_masks_and_datasets_that_do_not_belong_together_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "d", documents(1, 20), vocab_size=VOCAB)
    mask_of(np.ones(20, bool), min_tokens=1, idx_xxh3_128="other").save(tmp_path / "d.other")
    for mask, message in (("other", "made of other data"), ("none", r"d\.none cannot be read")):
        with pytest.raises(ValueError, match=message):
            Corpus([str(tmp_path / "d")], min_tokens=1, mask=mask)
    write_dataset(tmp_path / "e", documents(1, 20), vocab_size=VOCAB, tokenizer_digest="cd" * 32)
    with pytest.raises(ValueError, match=r"e has tokenizer_digest cd.*d has ab"):
        opened(tmp_path / "[de]")
    with pytest.raises(ValueError, match="another tokenizer or end-of-document rule"):
        opened(tuple(BlendPart(prefix=str(tmp_path / n), weight=1.0) for n in "de"))
    with pytest.raises(ValueError, match=r"no file .*none\*\.idx"):
        opened(tmp_path / "none*")


def test_a_dataset_in_an_object_store_gives_the_same_samples(folder: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in folder.glob("a0.*"):
        store.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    local = sampler(opened(folder / "a0"))
    part = BlendPart(prefix="memory://bucket/a0", weight=1.0)
    remote = open_corpus((part,), min_tokens=MIN_TOKENS, cache_dir=tmp_path / "cache")
    for i in range(30):
        assert local[i].suffix_ids.tolist() == sampler(remote)[i].suffix_ids.tolist()
    assert {p.suffix for p in (tmp_path / "cache").iterdir()} == {".json", ".idx", ".eligible"}
    with pytest.raises(ValueError, match=r"give data\.cache_dir"):
        open_corpus((part,), min_tokens=MIN_TOKENS, cache_dir=None)
    store.pipe_file("/bucket/a0.bin", b"short")
    with pytest.raises(ValueError, match="has 5 bytes, its manifest says"):
        sampler(open_corpus((part,), min_tokens=MIN_TOKENS, cache_dir=tmp_path / "cache"))[0]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> list[PrefixSuffixSampler]:
    """Blends whose masks keep one document in twenty, in three seeds."""
    path = tmp_path_factory.mktemp("sparse")
    for name, count in (("x0", 700), ("x1", 900), ("y0", 500)):
        write_dataset(path / name, documents(count, count), vocab_size=VOCAB, min_tokens=1)
        members = np.random.default_rng(count).random(count) < 0.05
        mask_file(path / name, members, name="few", min_tokens=1)
    parts = (
        BlendPart(prefix=str(path / "x*"), mask="few", weight=3.0),
        BlendPart(prefix=str(path / "y0"), mask="few", weight=1.0),
    )
    return [sampler(opened(parts), seed=seed) for seed in range(3)]


def test_ten_thousand_runs_that_are_stopped_and_resized_lose_and_repeat_nothing(
    sparse: list[PrefixSuffixSampler],
) -> None:
    """All that is kept at a stop is the number of consumed samples; then the run goes on with
    another number of ranks, which need not divide the batch."""
    origin = functools.cache(lambda which, i: sparse[which].origin(i))
    parts = sparse[0]._corpus.parts
    eligible = [[p.eligible_document(k) for k in range(p.num_eligible)] for p in parts]
    draw = random.Random(0)

    @functools.cache
    def positions(batch: int, dp_size: int) -> list[int]:
        """Of the batch, as the ranks read them."""
        ranks = [SimpleNamespace(dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
        found = np.concatenate([shard(batch, rank) for rank in ranks]).tolist()  # pyright: ignore
        assert found == list(range(batch))
        return found

    for _ in range(10_000):
        which, batch, consumed = draw.randrange(3), draw.randrange(1, 65), 0
        seen: list[Origin] = []
        while consumed < 200:
            dp_size = draw.randrange(1, 65)
            for _ in range(draw.randrange(1, 4)):  # steps until the next stop
                seen += [origin(which, consumed + p) for p in positions(batch, dp_size)]
                consumed += batch
        for part, members in enumerate(eligible):
            own = [o for o in seen if o.part == part]
            assert [o.number for o in own] == [n // len(members) for n in range(len(own))]
            for number in range(len(own) // len(members)):
                read = own[number * len(members) : (number + 1) * len(members)]
                assert sorted(o.document for o in read) == members, "lost or repeated"


def test_where_a_document_comes_agrees_with_looking_at_every_sample(
    sparse: list[PrefixSuffixSampler],
) -> None:
    order = sparse[0]
    origins = [order.origin(i) for i in range(1200)]
    for part, corpus in enumerate(order._corpus.parts):
        for document in range(0, corpus.num_documents, 7):
            brute = [i for i, o in enumerate(origins) if (o.part, o.document) == (part, document)]
            assert order.samples_of(part, document, last=1200) == brute


def test_reading_ahead_gives_the_same_samples_and_any_order_may_be_asked(folder: Path) -> None:
    order = sampler(opened(folder / "a*"))
    ahead = SampleReader(order, batch=8, steps=2)
    for first in (0, 8, 16, 400, 8, 24):
        found = ahead.read(first, [1, 3, 5])
        assert [s.sample_id for s in found] == [first + p for p in (1, 3, 5)]
        for sample in found:
            assert sample.prefix_ids.tolist() == order[sample.sample_id].prefix_ids.tolist()


def test_an_error_in_reading_ahead_comes_when_its_sample_is_asked_for() -> None:
    class Broken:
        def __getitem__(self, i: int) -> int:
            if i >= 4:
                raise ValueError(f"sample {i} cannot be read")
            return i

    reader = SampleReader(Broken(), batch=4, steps=1)  # pyright: ignore[reportArgumentType]
    assert reader.read(0, [0, 1]) == [0, 1]
    with pytest.raises(ValueError, match="sample 4 cannot be read"):
        reader.read(4, [0, 1])


def test_a_closed_reader_gives_up_what_was_to_be_read_ahead() -> None:
    begun, go_on, before = threading.Event(), threading.Event(), set(threading.enumerate())
    read: list[int] = []

    class Slow:
        def __getitem__(self, i: int) -> int:
            read.append(i)
            if i == 4:  # the first that is read ahead
                begun.set()
                go_on.wait(10)
            return i

    with SampleReader(Slow(), batch=4, steps=3) as reader:  # pyright: ignore[reportArgumentType]
        assert reader.read(0, [0, 1, 2, 3]) == [0, 1, 2, 3]
        assert begun.wait(10)
        timer = threading.Timer(0.05, go_on.set)  # while `close` waits
        timer.start()
    timer.join()
    assert read == [0, 1, 2, 3, 4]
    assert set(threading.enumerate()) <= before
    reader.close()  # twice does no harm


def test_a_process_with_a_closed_reader_ends_without_reading_ahead() -> None:
    program = (
        "import time\n"
        "from megatron_sip.data.sample_reader import SampleReader\n"
        "class Slow:\n"
        "    def __getitem__(self, i):\n"
        "        time.sleep(0.2 if i else 0)\n"
        "        print(i, flush=True)\n"
        "with SampleReader(Slow(), batch=1, steps=50) as reader:\n"
        "    reader.read(0, [0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) < 5
