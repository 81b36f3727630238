"""deployments/: the deployments, the form that their parameters make, and the production form, as far as they show unrun."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from flows import settings
from rlhf_core.config import load_config
from rlhf_core.specs import STAGES
from rlhf_core.store import Store

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
PRODUCTION = ROOT / "deployments" / "production"
COMPOSE = yaml.safe_load((PRODUCTION / "compose.yaml").read_text())
UNITS = sorted(PRODUCTION.glob("*.service"))
QUICKSTART = ROOT / "deployments" / "configs" / "quickstart.yaml"


def variables_of(text: str) -> dict[str, str]:
    """An environment file as systemd and compose read it."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def settings_known_to_prefect() -> set[str]:
    from prefect.settings import Settings
    from prefect.settings.legacy import _get_settings_fields

    return set(_get_settings_fields(Settings))


# --- prefect.yaml ----------------------------------------------------------------------------------------------------


def test_the_pipeline_every_stage_and_sweeps_have_a_deployment_whose_entrypoint_is_their_flow():
    from prefect.flows import load_flow_from_entrypoint

    from flows.deploy import DEPLOYMENTS as NAMES

    found = {}
    for deployment in DEPLOYMENTS["deployments"]:
        flow = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
        found[deployment["name"]] = f"{flow.name}/{deployment['name']}"
    assert tuple(found.values()) == NAMES
    assert list(found) == ["pipeline", *STAGES, "sweep"]


def test_no_deployment_has_a_limit_of_its_own_and_no_run_writes_to_its_worker():
    for deployment in DEPLOYMENTS["deployments"]:
        assert "concurrency_limit" not in deployment
        assert deployment["work_pool"]["job_variables"]["stream_output"] is False


def test_every_run_of_a_deployment_gives_heartbeats_often_enough_for_the_silence_that_is_taken_for_death():
    from flows.automations import SILENCE_SECONDS

    for deployment in DEPLOYMENTS["deployments"]:
        every = int(deployment["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
        assert every == settings.HEARTBEAT_SECONDS
        assert SILENCE_SECONDS >= 3 * every


def test_the_schedules_are_valid_and_asleep():
    from prefect.client.schemas.schedules import construct_schedule

    [schedules] = [each["schedules"] for each in DEPLOYMENTS["deployments"] if "schedules" in each]
    assert {next(kind for kind in ("cron", "interval") if kind in each) for each in schedules} == {"cron", "interval"}
    for schedule in schedules:
        assert schedule["active"] is False and schedule["slug"]
        construct_schedule(**{name: value for name, value in schedule.items() if name not in ("slug", "active")})


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def form():
    """The schema that Prefect's UI makes a form of."""
    from flows.rlhf import rlhf

    return rlhf.parameters.model_dump_for_openapi()


def test_every_parameter_of_the_form_says_what_it_is(form):
    assert list(form["properties"]) == ["config", "force", "config_file", "overrides"]
    assert all(field["description"] for field in form["properties"].values())


def test_the_form_knows_limits_choices_and_descriptions_of_the_fields_below_it(form):
    models = form["definitions"]
    assert models["ResourceTable"]["properties"]["zero_stage"]["maximum"] == 3
    assert "dpo" in models["PipelineConfig"]["properties"]["method"]["enum"]
    assert "description" in models["PipelineConfig"]["properties"]["store"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ppo": {"kl_cof": 0.1}}, "kl_cof"),
        ({"resources": {"zero_stage": 9}}, "9 is greater than the maximum of 3"),
        ({"method": "prayer"}, "prayer"),
    ],
)
def test_the_form_refuses_unknown_keys_and_values_beyond_their_limits(form, change, complaint):
    from prefect.utilities.schema_tools.validation import validate

    config = load_config(QUICKSTART).model_dump(mode="json")
    assert not validate({"config": config}, form)
    assert not validate({"config_file": str(QUICKSTART)}, form)
    for field, value in change.items():
        config[field] = {**config[field], **value} if isinstance(value, dict) else value
    [error] = validate({"config": config}, form)
    assert complaint in error.message


def test_a_configuration_is_given_by_itself_or_by_its_file(tmp_path):
    from flows.parameters import chosen

    config = load_config(QUICKSTART)
    store = Store(f"file://{tmp_path}")
    store.write("configs/mine.yaml", QUICKSTART.read_bytes())
    assert chosen(config, None) is config
    assert chosen(None, str(QUICKSTART)) == config
    assert chosen(None, f"file://{tmp_path}/configs/mine.yaml") == config
    assert chosen(None, f"file://{tmp_path}/configs/mine.yaml", ["ppo.kl_coef=0.5"]).ppo.kl_coef == 0.5


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ((None, None), "give one of the two"),
        (("config", "file.yaml"), "give one of the two"),
        ((None, "no/such.yaml"), "no such file"),
        ((None, "file:///no/such.yaml"), "no such object"),
        (("config", None, ["seed=1"]), "is for a config_file"),
    ],
)
def test_what_is_wrong_with_the_choice_of_a_configuration_is_said(given, complaint):
    from flows.parameters import chosen
    from rlhf_core.errors import ConfigError

    config, *rest = given
    with pytest.raises(ConfigError, match=complaint):
        chosen(load_config(QUICKSTART) if config else None, *rest)


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_profile_of_the_stack_is_toml_with_settings_that_prefect_knows():
    read = tomllib.loads(settings.profile("http://127.0.0.1:4200/api"))
    own = read["profiles"][read["active"]]
    assert own["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert own.keys() <= settings_known_to_prefect()


def test_the_environment_file_has_the_settings_of_the_profile():
    given = variables_of((PRODUCTION / "rlhf.env").read_text())
    assert {**settings.OFFLINE, **settings.LASTING}.items() <= given.items()


@pytest.mark.parametrize("file", sorted(p for p in PRODUCTION.iterdir()), ids=lambda file: file.name)
def test_every_setting_of_prefect_that_is_named_exists(file):
    assert set(re.findall(r"\bPREFECT_[A-Z_0-9]+\b", file.read_text())) <= settings_known_to_prefect()


# --- systemd, containers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS, ids=lambda file: file.name)
def test_systemd_accepts_the_units(unit, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for each in UNITS:  # programs are looked for where the units have them
        (tmp_path / each.name).write_text(each.read_text().replace("/opt/rlhf/.venv/bin/prefect", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / unit.name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_runs_outlive_the_worker_that_systemd_ends():
    unit = (PRODUCTION / "rlhf-worker.service").read_text()
    assert "\nKillMode=process\n" in unit
    assert "\nOOMPolicy=continue\n" in unit


def test_the_units_start_the_commands_of_the_containers():
    """Both forms run the same programs; only addresses differ."""
    for unit, service in (("rlhf-server", "server"), ("rlhf-worker", "worker")):
        [line] = re.findall(r"^ExecStart=(.*)$", (PRODUCTION / f"{unit}.service").read_text(), re.MULTILINE)
        words = COMPOSE["services"][service]["command"]
        assert shlex.split(line)[1:4] == words[1:4]


def test_the_compose_file_is_whole():
    services = COMPOSE["services"]
    allowed = set("image build command environment env_file ports volumes depends_on healthcheck restart init".split())
    for name, service in services.items():
        assert set(service) <= allowed | {"stop_grace_period", "shm_size"}, name
        for file in service.get("env_file", []):
            assert (PRODUCTION / file).is_file()
        for other, how in service.get("depends_on", {}).items():
            assert other in services
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[other]
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in COMPOSE["volumes"]
    build = services["server"]["build"]
    assert (PRODUCTION / build["context"] / build["dockerfile"]).is_file()


def test_the_container_file_copies_what_there_is():
    for line in (PRODUCTION / "Containerfile").read_text().splitlines():
        word, _, rest = line.partition(" ")
        if word == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), line
        assert not line or line.startswith("#") or word in "ARG FROM RUN WORKDIR COPY USER ENV CMD".split(), line
