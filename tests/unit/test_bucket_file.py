"""Buckets are bounded safetensors files of one size, written in place and read without a copy."""

import json
import mmap

import pytest
import torch
from exchange_helpers import small_weights
from safetensors.torch import load_file, save_file

from megatron_sip.rollout.bucket_file import PADDING, MappedBucket, Slot, plan_buckets
from megatron_sip.rollout.digest import bytes_digest, tensor_digest


def stream_of(tensors):
    return [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]


def write(slot, layout, tensors):
    slot.begin(layout)
    for place in layout.places:
        slot.write(place, tensors[place.name])


@pytest.fixture
def slot_of(tmp_path):
    slots = []

    def make(size):
        slots.append(Slot(tmp_path / f"slot_{len(slots)}.safetensors", size))
        return slots[-1]

    yield make
    for slot in slots:
        slot.close()
    assert not list(tmp_path.glob("slot_*"))


@pytest.mark.parametrize("limit", [1, 600, 1024, 10**9])
def test_buckets_are_bounded_complete_and_in_order(limit):
    tensors = small_weights()
    layouts, size = plan_buckets(stream_of(tensors), limit)
    places = [place for layout in layouts for place in layout.places]
    assert [(p.name, p.dtype, p.shape) for p in places] == stream_of(tensors)
    for layout in layouts:
        assert layout.num_bytes <= limit or len(layout.places) == 1
        assert all(p.begin % p.dtype.itemsize == 0 and p.end <= size for p in layout.places)
    assert len(layouts) == {1: 7, 600: 6, 1024: 3, 10**9: 1}[limit]


def test_any_reader_of_safetensors_reads_what_was_written_again_and_again(slot_of):
    limit, sizes = 1024, set()
    layouts, size = plan_buckets(stream_of(small_weights()), limit)
    slot = slot_of(size)
    for seed in (1, 2):
        tensors = small_weights(seed)
        for layout in layouts:
            write(slot, layout, tensors)
            found = load_file(slot.path)
            assert found.pop(PADDING).dtype == torch.uint8
            assert found.keys() == {p.name for p in layout.places}
            assert all(torch.equal(t, tensors[n]) for n, t in found.items())
            mine = dict(MappedBucket(slot.path).tensors())
            assert all(torch.equal(mine[n], t) and mine[n].dtype == t.dtype
                       for n, t in found.items())  # fmt: skip
            for place in layout.places:
                digest = bytes_digest(place.dtype, place.shape, slot.content(place))
                assert digest == tensor_digest(tensors[place.name])
            sizes.add(slot.path.stat().st_size)
    assert sizes == {size}  # a file that shrinks would lose its pages


def test_files_of_others_are_read_as_well(tmp_path):
    tensors = small_weights() | {"scalar": torch.tensor(1.5), "none": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = dict(MappedBucket(tmp_path / "x.safetensors").tensors())
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) for n, t in tensors.items())


def test_what_is_still_used_is_kept_when_the_file_is_rewritten(slot_of):
    tensors = {"a": torch.arange(5000.0), "b": torch.ones(3000)}
    (layout,), size = plan_buckets(stream_of(tensors), 10**9)
    slot = slot_of(size)
    write(slot, layout, tensors)
    bucket = MappedBucket(slot.path)
    used, unused = bucket.tensor("a")[7:], bucket.tensor("b")
    del unused
    assert bucket.keep() == tensors["a"].nbytes
    write(slot, layout, {n: torch.zeros_like(t) for n, t in tensors.items()})
    assert torch.equal(used, tensors["a"][7:])
    assert not torch.equal(bucket.tensor("b"), tensors["b"])  # it was a view of the file


def test_a_write_to_a_received_tensor_changes_no_file(slot_of):
    tensors = {"a": torch.arange(100.0)}
    (layout,), size = plan_buckets(stream_of(tensors), 10**9)
    slot = slot_of(size)
    write(slot, layout, tensors)
    MappedBucket(slot.path).tensor("a").zero_()
    assert torch.equal(MappedBucket(slot.path).tensor("a"), tensors["a"])


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


BROKEN_HEADERS = {
    "outside of the file": entry(shape=[5000], data_offsets=[0, 20000]),
    "before the file": entry(data_offsets=[-16, 0]),
    "end before begin": entry(data_offsets=[16, 0]),
    "size and shape": entry(shape=[5]),
    "unknown dtype": entry(dtype="F12"),
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "a list": [1, 2],
    "a number": {"a": 3},
}


@pytest.mark.parametrize("what", BROKEN_HEADERS)
def test_a_header_that_lies_is_refused(what, tmp_path):
    text = json.dumps(BROKEN_HEADERS[what]).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(mmap.PAGESIZE))
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        dict(MappedBucket(path).tensors())


@pytest.mark.parametrize("content", [b"12345678", b"\xff" * 64, bytes(64), b"\x08" + bytes(63)])
def test_what_is_no_safetensors_file_is_refused(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        MappedBucket(path)


def test_a_slot_without_room_is_refused_before_a_page_is_missing(tmp_path):
    with pytest.raises(OSError):
        Slot(tmp_path / "huge", 2**60)
