"""The receiver's ledger alone: one whole update after the other, and nothing after a refusal."""

from dataclasses import replace

import pytest

from megatron_sip.benchmark.weight_sync import H100_LINKS, h100_floor
from megatron_sip.rollout.ledger import Announcement, Receipt, UpdateLedger, UpdateRefused, Whole

TENSORS = ({"a": "1", "b": "2"}, {"c": "3"}, {"d": "4", "e": "5"})


def update_of(name="u", version=1, tensors=TENSORS, may_equal=False):
    whole, made = Whole(), []
    total = sum(map(len, tensors))
    for index, digests in enumerate(tensors):
        whole.add(digests)
        last = index == len(tensors) - 1
        made.append(
            Announcement(name, version, index, len(tensors), total, dict(digests),
                         whole.digest if last else "", may_equal)
        )  # fmt: skip
    return made


def receive(ledger, buckets, *, start=True, finish=True):
    if start:
        ledger.start()
    receipt = None
    for bucket in buckets:
        ledger.accept(bucket)
        receipt = ledger.verify(bucket.digests)
    if finish:
        ledger.finish()
    return receipt


def held(version=1):
    ledger = UpdateLedger()
    receive(ledger, update_of("first", version))
    return ledger


def test_whole_updates_are_taken_one_after_the_other():
    ledger = UpdateLedger()
    other = ({"a": "7", "b": "2"}, *TENSORS[1:])
    for version, tensors in ((3, TENSORS), (4, other), (9, TENSORS)):
        buckets = update_of(f"u{version}", version, tensors)
        receipt = receive(ledger, buckets)
        assert receipt == Receipt(f"u{version}", version, buckets[-1].whole, 5)
        assert (ledger.version, ledger.whole, ledger.broken) == (version, receipt.whole, "")


REFUSED = {
    "no start": (lambda b: b, "outside of an update"),
    "second bucket first": (lambda b: b[1:], "out of turn: number 0 is due"),
    "a bucket twice": (lambda b: [b[0], b[0]], "out of turn: number 1 is due"),
    "a bucket left out": (lambda b: [b[0], b[2]], "out of turn: number 1 is due"),
    "more than announced": (lambda b: [*b, replace(b[2], index=3)], "out of turn: number 3"),
    "a tensor twice": (lambda b: [b[0], replace(b[1], digests={"a": "1"})], "a is sent twice"),
    "no tensor": (lambda b: [replace(b[0], digests={})], "the last bucket, and no other"),
    "whole too early": (lambda b: [replace(b[0], whole="x")], "the last bucket, and no other"),
    "no whole": (lambda b: [*b[:2], replace(b[2], whole="")], "the last bucket, and no other"),
    "another whole": (lambda b: [*b[:2], replace(b[2], whole="x")], "as a whole differs"),
    "another update": (lambda b: [b[0], replace(b[1], update="v")], "belongs to another update"),
    "another version": (lambda b: [b[0], replace(b[1], version=3)], "belongs to another update"),
    "another count": (lambda b: [b[0], replace(b[1], count=4)], "belongs to another update"),
    "tensors missing": (
        lambda b: [replace(x, num_tensors=6) for x in b], "holds 5 tensors, 6 were announced"
    ),
    "sent before": (lambda b: [replace(x, update="first") for x in b], "was sent before"),
    "an old version": (lambda b: [replace(x, version=0) for x in b], "older than 1, the held"),
    "no move": (lambda b: update_of("u", 2), "brings the bytes of version 1, though the policy"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_the_next_whole_update_is_refused_for_good(what):
    ledger, (change, says) = held(), REFUSED[what]
    buckets = update_of("u", 2, ({"a": "8", "b": "9"}, *TENSORS[1:]))
    with pytest.raises(UpdateRefused, match=says):
        receive(ledger, change(buckets), start=what != "no start", finish=False)
    assert ledger.broken and ledger.version == 1
    for act in (ledger.start, ledger.finish, lambda: ledger.accept(buckets[0])):
        with pytest.raises(UpdateRefused, match="restart the server"):
            act()
    assert ledger.version == 1


@pytest.mark.parametrize("found", [{"a": "1"}, {"a": "1", "b": "2", "z": "3"},
                                   {"a": "1", "b": "3"}, {"a": "2", "b": "1"}, {}])  # fmt: skip
def test_tensors_that_are_not_the_announced_ones_are_refused(found):
    ledger = UpdateLedger()
    ledger.start()
    ledger.accept(update_of()[0])
    with pytest.raises(UpdateRefused, match=r"not the announced ones|received bytes differ"):
        ledger.verify(found)
    assert ledger.broken


@pytest.mark.parametrize("num_buckets", [0, 1, 2])
def test_an_update_ends_after_its_last_bucket_and_not_before(num_buckets):
    ledger = UpdateLedger()
    with pytest.raises(UpdateRefused, match=f"ends after {num_buckets} of"):
        receive(ledger, update_of()[:num_buckets])
    assert (ledger.version, ledger.whole) == (-1, "")


def test_an_update_does_not_begin_within_another():
    ledger = held()
    receive(ledger, update_of("u", 2)[:1], finish=False)
    with pytest.raises(UpdateRefused, match="while another one is open"):
        ledger.start()


def test_the_same_bytes_are_taken_where_the_policy_did_not_move_or_the_version_is_the_same():
    ledger = held()
    receive(ledger, update_of("again", 1))
    receive(ledger, update_of("step without a gradient", 2, may_equal=True))
    assert ledger.version == 2


def test_order_and_names_are_part_of_the_whole():
    wholes = {
        update_of(tensors=tensors)[-1].whole
        for tensors in (
            TENSORS, TENSORS[::-1], ({"a": "2", "b": "1"}, *TENSORS[1:]),
            ({"a 1\nb": "2"}, *TENSORS[1:]),
        )
    }  # fmt: skip
    assert len(wholes) == 4


def test_the_floor_of_an_h100_is_bytes_over_bandwidth():
    floor = h100_floor()
    assert floor["8B_nvlink_s"] == pytest.approx(16e9 / 450e9)
    assert floor["70B_network_s"] == pytest.approx(2 * 70.6e9 / 50e9)
    assert all(s > 0 for s in floor.values()) and len(floor) == 3 * len(H100_LINKS)
