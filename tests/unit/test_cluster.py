"""The cluster of a job as people write it: names, options, what travels, and what it is refused for."""

from fnmatch import fnmatchcase

import pytest
from pydantic import ValidationError

from rlhf_core.cluster import Cluster, Host, secret_names


def test_a_host_may_be_its_name_alone():
    assert Host.model_validate("me@node1") == Host(host="me@node1")
    assert Cluster.model_validate({"hosts": ["a", {"host": "b", "slots": 2}]}).hosts == (
        Host(host="a"),
        Host(host="b", slots=2),
    )
    assert Cluster.model_validate({"hosts": "deployments/hostfile"}).hosts == "deployments/hostfile"


@pytest.mark.parametrize("name", ["-oProxyCommand=reboot", "a b", "a;b", "$(a)", "", "@a"])
def test_what_could_be_an_option_or_a_command_is_no_host(name):
    with pytest.raises(ValidationError):
        Host(host=name)


@pytest.mark.parametrize("name", ["A B", "1A", "A=B", "A\nB", ""])
def test_what_is_no_variable_s_name_is_refused(name):
    with pytest.raises(ValidationError):
        Cluster(env={name: "x"})


def test_unknown_keys_are_errors():
    with pytest.raises(ValidationError, match="extra"):
        Cluster.model_validate({"node": 2})


@pytest.mark.parametrize(
    "name", ["DS_ACCELERATOR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PATH", "HOME", "TMPDIR"]
)
def test_what_is_this_machine_s_own_does_not_travel_to_nodes(name):
    assert not [pattern for pattern in Cluster().forward if fnmatchcase(name, pattern)]


def test_names_of_secrets_are_told_from_names_of_places_and_of_other_things():
    secret = ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "PGPASSWORD", "MYTOKEN", "OPENAI_API_KEY"]
    harmless = ["AWS_WEB_IDENTITY_TOKEN_FILE", "HF_TOKEN_PATH", "TOKENIZERS_PARALLELISM", "AWS_ENDPOINT_URL", "KEYS"]
    assert secret_names([*secret, *harmless]) == secret
