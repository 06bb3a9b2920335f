"""Every rank takes part in a weight exchange, and every rank learns how it ended."""

from __future__ import annotations

from typing import Any

import exchange_tasks
import numpy as np
import pytest
from workers import Layout, Workers


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2), Layout(tp=2, pp=2)], ids=str)
def test_every_rank_sees_the_same_end_of_an_exchange_good_or_bad(
    workers: Workers, layout: Layout
) -> None:
    ranks = workers.run(layout, exchange_tasks.exchanges)
    assert ranks[0]["same"] == [True, True]
    main: dict[str, Any] = ranks[0]
    assert {"sync/seconds", "sync/apply_s", "sync/server_s/b"} <= set(main["good"]["means"])
    for seen in ranks:
        io = seen["good"]["served"] != "not asked"
        if io:
            assert seen["good"]["served"].startswith("3-")
            assert seen["restored"]["served"].startswith("4-")
            assert seen["broken"]["served"] == seen["wrong probe"]["served"] == ""
        assert "means" in seen["good"] and "means" in seen["restored"]
        for what in ("broken", "not restarted", "wrong probe"):
            assert seen[what]["failed"] == main[what]["failed"]
    assert main["broken"]["failed"][1:] == ("b", "update", ("a", "b"))
    assert "ZeroDivisionError" in main["broken"]["failed"][0]
    assert main["not restarted"]["failed"][1:] == ("a", "init", ("a", "b"))
    assert main["wrong probe"]["failed"][1:] == ("a", "verify", ())
    assert "differ from the trainer's by 0.5 nats" in main["wrong probe"]["failed"][0]


@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_exported_after_a_step_is_what_the_optimizer_holds(
    workers: Workers, overlap: bool
) -> None:
    ranks = workers.run(Layout(dp=2), exchange_tasks.exported_after_a_step, overlap)
    assert [rank["moved"] for rank in ranks] == [1, 1]
    assert all(rank["main"] for rank in ranks)
    assert [rank["stale"] for rank in ranks] == [overlap, overlap]  # so it could have been wrong
    plain = workers.run(Layout(dp=2), exchange_tasks.exported_after_a_step, False)[0]["exported"]
    assert ranks[0]["exported"].keys() == plain.keys()
    for name, tensor in plain.items():
        np.testing.assert_array_equal(ranks[0]["exported"][name], tensor)
