"""Which machines a job's ranks get: hostfiles, lists, include and exclude, hosts left out, batches that must divide."""

import pytest
from pydantic import ValidationError

from rlhf_core.errors import ConfigError
from rlhf_core.hosts import batch_of, is_unnamed, parse_selection, read_hostfile, seats, world
from rlhf_core.resources import Resources, ResourceTable

HOSTFILE = """
# the cluster
node1 slots=4
root@node2 slots=2   # an older one

node3    slots=4
"""


@pytest.fixture
def hostfile(tmp_path) -> str:
    file = tmp_path / "hostfile"
    file.write_text(HOSTFILE)
    return str(file)


def over_ssh(hosts: object, processes: int = 1, **cluster: object) -> Resources:
    return Resources.model_validate(
        {"launcher": "hostfile", "processes": processes, "cluster": {"hosts": hosts, **cluster}}
    )


def names(resources: Resources, batch: int | None = None, left_out: tuple[str, ...] = ()) -> list[str]:
    return [seat.host for seat in seats(resources, batch, left_out)]


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_hostfile_gives_hosts_in_its_order_with_their_slots(hostfile):
    assert [(m.host, len(m.slots)) for m in read_hostfile(hostfile)] == [("node1", 4), ("root@node2", 2), ("node3", 4)]


def test_deepspeed_reads_the_same_hosts_and_slots_from_the_same_lines(hostfile):
    from deepspeed.launcher.runner import fetch_hostfile

    assert {m.host: len(m.slots) for m in read_hostfile(hostfile)} == dict(fetch_hostfile(hostfile))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("node1 slots=2\nnode1 slots=2", ":2: the host 'node1' is there twice"),
        ("node1 slots=2\nroot@node1 slots=2", ":2: the host 'node1' is there twice"),
        ("node1", ":1: 'node1': write NAME slots=N"),
        ("\nnode1 slots=x", ":2: 'node1 slots=x': write NAME slots=N"),
        ("node1 slots=0", ":1: 'node1 slots=0': write NAME slots=N"),
        ("node1 slots=2 gpus=3", "write NAME slots=N"),
        ("-oProxyCommand=sh slots=1", "write NAME slots=N"),
        ("# nothing\n\n", "names no host"),
    ],
)
def test_a_bad_line_of_a_hostfile_is_named_with_its_file_and_number(tmp_path, line, said):
    (file := tmp_path / "hosts").write_text(line)
    with pytest.raises(ConfigError) as error:
        seats(over_ssh(str(file)))
    assert str(error.value).startswith(str(file)) and said in str(error.value)


def test_a_hostfile_that_is_not_there_is_told_with_the_place_that_was_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"resources.cluster.hosts.*'hosts.txt'.*{tmp_path}/hosts.txt"):
        seats(over_ssh("hosts.txt"))


def test_a_list_of_hosts_may_be_names_alone_and_each_has_room_for_its_processes():
    found = seats(over_ssh(["node1", {"host": "me@10.0.0.2", "env": {"NCCL_DEBUG": "INFO"}}], processes=2))
    assert [(s.node, s.host, s.processes, s.first_rank, s.env) for s in found] == [
        (0, "node1", 2, 0, {}),
        (1, "me@10.0.0.2", 2, 2, {"NCCL_DEBUG": "INFO"}),
    ]


def test_a_host_that_is_listed_twice_is_refused():
    with pytest.raises(ConfigError, match="'node1' is there twice"):
        seats(over_ssh(["node1", "root@node1"]))


# --- include and exclude ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({}, {"node1": (), "root@node2": (), "node3": ()}),
        ({"include": "node3@node1"}, {"node1": (), "node3": ()}),
        ({"include": "node1:1,3@node3"}, {"node1": (1, 3), "node3": ()}),
        ({"include": "node2@node3:2,3"}, {"root@node2": (), "node3": (2, 3)}),
        ({"exclude": "node2"}, {"node1": (), "node3": ()}),
        ({"exclude": "node1:0,2"}, {"node1": (1, 3), "root@node2": (), "node3": ()}),
        ({"exclude": "node1:0,1,2,3@node2"}, {"node3": ()}),
        ({"include": "node1:0@node1:3"}, {"node1": (0, 3)}),
    ],
)
def test_include_and_exclude_choose_hosts_and_devices(hostfile, selection, expected):
    found = seats(over_ssh(hostfile, processes=2, **selection))
    assert {seat.host: seat.devices for seat in found} == expected


@pytest.mark.parametrize(
    "selection", ["include=node1:1,3@node3", "include=node3@node1", "exclude=node1:0,2", "exclude=node1:0,1,2,3@node3"]
)
def test_deepspeed_chooses_the_same_slots(tmp_path, selection):
    from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

    (file := tmp_path / "hostfile").write_text(HOSTFILE.replace("root@", ""))
    field, _, text = selection.partition("=")
    given = {"include": "", "exclude": "", field: text}
    theirs = parse_inclusion_exclusion(fetch_hostfile(str(file)), given["include"], given["exclude"])
    from rlhf_core.hosts import machines

    assert {m.host: list(m.slots) for m in machines(over_ssh(str(file), **{field: text}))} == dict(theirs)


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ({"include": "node9"}, "resources.cluster.include: 'node9' is not among the hosts of .*: node1, node2, node3"),
        ({"include": "root@node2"}, "without a user"),
        ({"exclude": "node2:2"}, "resources.cluster.exclude: node2 has no slot 2; it has 2"),
        ({"include": "node1:"}, "write HOST or HOST:SLOT,SLOT"),
        ({"include": "node1:a"}, "write HOST or HOST:SLOT,SLOT"),
        ({"include": "node1@@node2"}, "write HOST or HOST:SLOT,SLOT"),
        ({"exclude": "node1@node2@node3"}, "leaves no host"),
    ],
)
def test_a_selection_that_names_what_is_not_there_is_refused(hostfile, selection, said):
    with pytest.raises(ConfigError, match=said):
        seats(over_ssh(hostfile, **selection))


def test_include_and_exclude_exclude_each_other():
    with pytest.raises(ValidationError, match="exclude each other"):
        over_ssh(["a", "b"], include="a", exclude="b")


def test_slots_of_one_host_may_be_given_in_several_parts():
    assert parse_selection("a:2@b@a:0", "field") == {"a": (0, 2), "b": ()}


# --- slots, nodes, batches -------------------------------------------------------------------------------------------


def test_a_host_with_too_few_slots_is_named_with_its_slots_the_processes_and_a_remedy(hostfile):
    with pytest.raises(ConfigError) as error:
        seats(over_ssh(hostfile, processes=4))
    said = str(error.value)
    assert "root@node2 has 2 slots" in said and "resources.processes is 4" in said
    assert "lower resources.processes" in said and "exclude" in said
    assert len(seats(over_ssh(hostfile, processes=4, exclude="node2"))) == 2


def test_a_host_with_too_few_selected_slots_is_refused_too(hostfile):
    with pytest.raises(ConfigError, match="node1 has 1 slots after include and exclude"):
        seats(over_ssh(hostfile, processes=2, include="node1:3@node3"))


def test_nodes_limits_how_many_hosts_take_part_and_the_rest_stand_by(hostfile):
    assert names(over_ssh(hostfile, nodes=2)) == ["node1", "root@node2"]
    with pytest.raises(ConfigError, match=r"resources.cluster.nodes: 4 machines, but there are 3"):
        seats(over_ssh(hostfile, nodes=4))
    with pytest.raises(ConfigError, match=r"resources.cluster.min_nodes: 4 machines, but there are 3"):
        seats(over_ssh(hostfile, min_nodes=4))


@pytest.mark.parametrize(
    ("cluster", "batch", "left_out", "expected"),
    [
        ({"nodes": 3}, None, ("b",), "acd"),  # one that stood by takes its place
        ({}, None, ("b",), "abcd"),  # by default never with fewer
        ({"min_nodes": 2}, None, ("b",), "acd"),
        ({"min_nodes": 2}, None, ("a", "b", "d"), "ac"),  # the first of those that are left out fills up
        ({"min_nodes": 2}, 8, (), "abcd"),
        ({"min_nodes": 2}, 8, ("b",), "ac"),  # 3 do not divide 8
        ({"min_nodes": 3}, 8, ("b",), "abcd"),  # only all of them do
        ({"min_nodes": 2}, 6, (), "abc"),
        ({"min_nodes": 1}, 7, ("a",), "b"),
    ],
)
def test_hosts_are_left_out_and_idle_only_as_the_least_number_and_the_batch_allow(cluster, batch, left_out, expected):
    assert names(over_ssh(list("abcd"), **cluster), batch, left_out) == list(expected)


def test_a_host_is_left_out_by_its_name_with_or_without_a_user():
    resources = over_ssh(["me@a", "me@b", "me@c"], min_nodes=1)
    assert names(resources, left_out=("b", "me@c")) == ["me@a"]


def test_ranks_are_numbered_without_a_gap_when_a_host_is_left_out():
    found = seats(over_ssh(list("abc"), processes=2, min_nodes=1), left_out=("a",))
    assert [(s.node, s.host, s.first_rank) for s in found] == [(0, "b", 0), (1, "c", 2)]


def test_a_batch_that_no_allowed_number_of_nodes_divides_is_refused_with_what_would():
    with pytest.raises(ConfigError, match=r"sft.batch_size = 10 .* 4 nodes of 2 processes; use a multiple of 8"):
        seats(over_ssh(list("abcd"), processes=2), 10, field="sft.batch_size")


@pytest.mark.parametrize("launcher", ["slurm", "nodes"])
def test_nodes_that_are_not_known_by_name_have_a_seat_each(launcher):
    resources = Resources.model_validate({"launcher": launcher, "processes": 4, "cluster": {"nodes": 3}})
    found = seats(resources, 24)
    assert [seat.host for seat in found] == ["node0000", "node0001", "node0002"]
    assert all(map(is_unnamed, found)) and world(resources) == 12
    assert not is_unnamed(seats(over_ssh(["node01"]))[0])


def test_a_local_job_has_one_seat_on_this_machine():
    [seat] = seats(Resources(processes=3), 9)
    assert (seat.host, seat.processes, seat.first_rank) == ("localhost", 3, 0)


def test_the_batch_of_ppo_is_that_of_a_minibatch_and_evaluation_has_none():
    assert batch_of("ppo", {"rollout_batch_size": 64, "minibatches": 4}) == 16
    assert batch_of("sft", {"batch_size": 8}) == 8
    assert batch_of("evaluate", {}) is None


# --- launcher and cluster --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"launcher": "hostfile"}, "needs cluster.hosts"),
        ({"launcher": "slurm"}, "needs cluster.nodes"),
        ({"launcher": "nodes", "cluster": {"nodes": 2, "hosts": ["a"]}}, "cluster.hosts is given, but launcher nodes"),
        ({"launcher": "slurm", "cluster": {"nodes": 2, "exclude": "a"}}, "cluster.exclude is given"),
        ({"cluster": {"hosts": ["a", "b"]}}, "launcher local does not heed it and runs on this machine alone"),
        ({"cluster": {"nodes": 2}}, "cluster.nodes is given, but launcher local"),
        ({"launcher": "hostfile", "cluster": {"hosts": ["-oProxyCommand=x"]}}, "pattern"),
        ({"launcher": "hostfile", "cluster": {"hosts": ["a"], "nodes": 1, "min_nodes": 2}}, "min_nodes 2 is more than"),
    ],
)
def test_launcher_and_cluster_must_go_together(given, said):
    with pytest.raises(ValidationError, match=said):
        Resources.model_validate(given)
    with pytest.raises(ValidationError, match=said):
        ResourceTable.model_validate(given)


def test_the_data_stage_is_always_local_and_a_stage_may_be():
    cluster = {"hosts": ["a", "b"]}
    table = ResourceTable.model_validate(
        {"launcher": "hostfile", "cluster": cluster, "stages": {"evaluate": {"launcher": "local"}}}
    )
    assert [table.of(stage).launcher for stage in ("data", "sft", "evaluate")] == ["local", "hostfile", "local"]
    assert table.of("evaluate").cluster.hosts is None


def test_a_cluster_may_be_described_for_the_one_stage_that_uses_it():
    table = ResourceTable.model_validate({"cluster": {"hosts": ["a"]}, "stages": {"ppo": {"launcher": "hostfile"}}})
    assert (table.of("sft").launcher, table.of("ppo").launcher) == ("local", "hostfile")
    assert world(table.of("ppo")) == 1


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "MY_PASSWORD", "WANDB_API_KEY", "client_secret"]
)
def test_a_credential_in_the_cluster_s_environment_is_refused_without_its_value(name):
    for cluster in ({"env": {name: "canary"}}, {"hosts": [{"host": "a", "env": {name: "canary"}}]}):
        with pytest.raises(ValidationError) as error:
            Resources.model_validate({"launcher": "hostfile", "cluster": {"hosts": ["a"], **cluster}})
        [found] = error.value.errors(include_input=False)
        assert name in found["msg"] and "cluster.forward" in found["msg"] and "canary" not in found["msg"]


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "AWS_SHARED_CREDENTIALS_FILE", "NCCL_DEBUG", "PYTHONPATH"])
def test_what_only_looks_like_a_credential_may_be_there(name):
    assert over_ssh(["a"], env={name: "x"}).cluster.env == {name: "x"}
