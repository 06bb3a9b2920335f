"""Weight updates of several servers go as one, in order, and stop for good at the first failure."""

import time

import pytest
from fake_rollout_servers import FakeServer, rollout_servers

from megatron_sip.rollout.control import ControlClient, WeightExchangeFailed

INIT = "/init_weight_transfer_engine"
PHASES = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]


def client_of(endpoints, *, timeout_s=5.0):
    return ControlClient(endpoints, timeout_s=timeout_s)


def actions(client):
    return {
        "pause": client.pause,
        "start": client.start_weight_update,
        "update": lambda: client.update_weights({"names": ["a"]}),
        "finish": lambda: client.finish_weight_update("7-abc"),
        "resume": client.resume,
    }


def whole_exchange(client):
    for act in actions(client).values():
        act()


def test_one_exchange_reaches_every_server_in_order_with_version_and_key():
    servers = [FakeServer("a", key="s3cret"), FakeServer("b")]
    with rollout_servers(*servers) as endpoints:
        client = client_of(endpoints)
        whole_exchange(client)
        whole_exchange(client)
    for server in servers:
        assert server.routes() == PHASES * 2 and not server.wrong
        assert server.bodies("/update_weights") == [{"update_info": {"names": ["a"]}}] * 2
        assert server.bodies("/finish_weight_update") == [{"weight_version": "7-abc"}] * 2
        assert server.calls[0][1] == "mode=wait&clear_cache=true"
    assert {call[3] for call in servers[0].calls} == {"Bearer s3cret"}
    assert {call[3] for call in servers[1].calls} == {""}


@pytest.mark.parametrize("route", [INIT, "/update_weights"])
def test_servers_are_called_at_once_as_each_answers_only_when_all_were_asked(route):
    servers = [FakeServer("a"), FakeServer("b")]
    with rollout_servers(*servers, together=route) as endpoints:
        client = client_of(endpoints)
        client.init_weight_transfer_engine({"master_port": 1, "rank_offset": 1})
        whole_exchange(client)
    assert all(route in server.routes() for server in servers)


@pytest.mark.parametrize("sizes", [(1, 2, 4), (4, 2, 1), (2, 2), (4,)])
def test_worker_ranks_tile_the_group_after_the_trainers(sizes):
    servers = [FakeServer(f"s{i}", world_size=size) for i, size in enumerate(sizes)]
    with rollout_servers(*servers) as endpoints:
        client = client_of(endpoints)
        world_size = 1 + sum(client.world_sizes())
        init = {"master_port": 1, "rank_offset": 1, "world_size": world_size}
        client.init_weight_transfer_engine(init)
    infos = [server.bodies(INIT)[0]["init_info"] for server in servers]
    ranks = [
        i["rank_offset"] + r for i, size in zip(infos, sizes, strict=True) for r in range(size)
    ]
    assert ranks == list(range(1, world_size))
    assert all(info | {"rank_offset": 1} == init for info in infos)


def test_a_backend_without_ranks_tells_each_server_its_name():
    servers = [FakeServer("a"), FakeServer("b", world_size=2)]
    with rollout_servers(*servers) as endpoints:
        client_of(endpoints).init_weight_transfer_engine({"root": "/x"})
    infos = [server.bodies(INIT)[0]["init_info"] for server in servers]
    assert infos == [{"root": "/x", "server": name} for name in ("a", "b")]
    assert [len(s.calls) for s in servers] == [1, 1]


OUT_OF_ORDER = [
    ("finish",),
    ("start",),
    ("update",),
    ("resume",),
    ("pause", "pause"),
    ("pause", "update"),
    ("pause", "finish"),
    ("pause", "start", "resume"),
    ("pause", "start", "start"),
    ("pause", "start", "update", "pause"),
    ("pause", "start", "update", "resume"),
    ("pause", "start", "update", "finish", "update"),
    ("pause", "start", "update", "finish", "finish"),
]


@pytest.mark.parametrize("order", OUT_OF_ORDER)
def test_calls_out_of_order_are_refused_and_never_sent(order):
    server = FakeServer("a")
    with rollout_servers(server) as endpoints:
        act = actions(client_of(endpoints))
        for name in order[:-1]:
            act[name]()
        with pytest.raises(WeightExchangeFailed, match=f"{order[-1]} is not allowed while"):
            act[order[-1]]()
    assert len(server.calls) == len(order) - 1 and not server.wrong


@pytest.mark.parametrize("failure", ["error", "drop", "hang", "redirect"])
@pytest.mark.parametrize("phase", [INIT, *PHASES])
def test_a_failure_names_server_and_phase_and_nothing_is_resumed_after_it(phase, failure):
    servers = [FakeServer("good"), FakeServer("bad", fail={phase: failure})]
    with rollout_servers(*servers) as endpoints:
        client = client_of(endpoints, timeout_s=2.0)  # the good server must answer in it
        with pytest.raises(WeightExchangeFailed, match=f"server bad: {phase}"):
            client.init_weight_transfer_engine({"root": "/x"})
            whole_exchange(client)
        num_calls = [len(server.calls) for server in servers]
        for act in actions(client).values():
            with pytest.raises(WeightExchangeFailed, match="not allowed"):
                act()
    assert [len(server.calls) for server in servers] == num_calls
    if phase != "/resume":
        assert all("/resume" not in server.routes() for server in servers)


SHORT = dict(
    zip([INIT, *PHASES], ["init", "pause", "start", "update", "finish", "resume"], strict=True)
)


@pytest.mark.parametrize("phase", SHORT)
def test_a_failure_says_which_servers_must_be_restarted(phase):
    servers = [FakeServer("a"), FakeServer("bad", fail={phase: "error"}), FakeServer("c")]
    with rollout_servers(*servers) as endpoints:
        client = client_of(endpoints)
        with pytest.raises(WeightExchangeFailed) as found:
            client.init_weight_transfer_engine({"root": "/x"})
            whole_exchange(client)
        assert client.failure is found.value
    assert (found.value.server, found.value.phase) == ("bad", SHORT[phase])
    half_done = phase in ("/start_weight_update", "/update_weights")
    assert found.value.broken == (("a", "bad", "c") if half_done else ("bad",))


def test_a_slow_server_is_named_when_the_deadline_of_the_whole_exchange_passes():
    servers = [FakeServer("quick"), FakeServer("slow", fail={"/update_weights": "hang"})]
    with rollout_servers(*servers) as endpoints:
        client = client_of(endpoints, timeout_s=1.5)
        client.pause()
        time.sleep(0.7)
        client.start_weight_update()
        begin = time.monotonic()
        with pytest.raises(WeightExchangeFailed, match=r"slow: .* within the deadline of 1\.5 s"):
            client.update_weights({})
        assert time.monotonic() - begin < 1.4  # what was left of it
    assert client.seconds["slow"] > client.seconds["quick"]


def test_a_trainer_that_is_slow_itself_blames_no_server():
    server = FakeServer("a")
    with rollout_servers(server) as endpoints:
        client = client_of(endpoints, timeout_s=0.5)
        client.pause()
        time.sleep(0.6)
        with pytest.raises(
            WeightExchangeFailed, match=r"deadline of 0\.5 s passed before"
        ) as found:
            client.start_weight_update()
    assert found.value.server == "" and server.routes() == ["/pause"]


def failed_client(endpoints):
    client = client_of(endpoints)
    with pytest.raises(WeightExchangeFailed):
        whole_exchange(client)
    return client


def test_a_broken_server_is_taken_back_only_after_a_restart():
    broken = {"/update_weights": "error"}
    with rollout_servers(FakeServer("a"), FakeServer("b", fail=broken)) as old:
        client = failed_client(old)
        with pytest.raises(WeightExchangeFailed, match=r"server a: .* was not restarted"):
            client.replace(old)
        with rollout_servers(FakeServer("a"), FakeServer("b")) as fresh:
            with pytest.raises(WeightExchangeFailed, match=r"server b: .* was not restarted"):
                client.replace([fresh[0], old[1]])
            with pytest.raises(ValueError, match="same names in the same order"):
                client.replace(fresh[::-1])
            with pytest.raises(WeightExchangeFailed, match="not allowed while failed"):
                client.pause()
            client.replace(fresh)
            whole_exchange(client)


def test_a_server_that_others_run_must_say_that_it_was_just_started():
    server = FakeServer("a")
    with rollout_servers(server) as endpoints:
        client = client_of(endpoints)
        whole_exchange(client)
        server.fail["/update_weights"] = "error"
        with pytest.raises(WeightExchangeFailed):
            whole_exchange(client)
        with pytest.raises(WeightExchangeFailed, match="it holds weights '7-abc'; restart it"):
            client.replace(endpoints)
        server.fail.clear()
        server.version, server.state = "default", "serving"  # restarted under its old address
        client.replace(endpoints)
        whole_exchange(client)


def test_an_unreachable_server_is_named():
    with rollout_servers(FakeServer("gone")) as endpoints:
        pass
    with pytest.raises(WeightExchangeFailed, match="server gone: /pause"):
        client_of(endpoints, timeout_s=2.0).pause()


def test_an_update_without_a_version_is_never_finished():
    server = FakeServer("a")
    with rollout_servers(server) as endpoints:
        client = client_of(endpoints)
        act = actions(client)
        for name in ("pause", "start", "update"):
            act[name]()
        with pytest.raises(WeightExchangeFailed, match="without a version"):
            client.finish_weight_update()
        assert "/finish_weight_update" not in server.routes()
        client.weight_version = "3-nccl"
        client.finish_weight_update()  # as vLLM's engines call it
    assert server.bodies("/finish_weight_update") == [{"weight_version": "3-nccl"}]
