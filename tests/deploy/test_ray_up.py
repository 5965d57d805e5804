"""The files for ray up pass Ray's own checks, agree with each other, and name what the project has."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted([ROOT / "cluster.yaml", *(ROOT / "deploy" / "ray").glob("*.yaml")])
CLOUDS = [path for path in FILES if path.name != "onpremise.yaml"]
SHARED = ("file_mounts", "idle_timeout_minutes", "max_workers")


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def commands(cluster):
    kinds = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    return [command for kind in kinds for command in cluster.get(kind, [])]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_rays_own_checks_accept_it(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(load(path))
    validate_config(prepared)
    assert prepared["max_workers"] == 2


def test_rays_own_checks_refuse_a_field_that_it_does_not_know():
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        validate_config(prepare_config({**load(FILES[0]), "setup_comands": []}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_token_and_tls_are_on_and_the_dashboard_is_on_loopback(path):
    cluster = load(path)
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all(command.startswith(". ~/medfl/node/ray.env && ") for command in starts)
    head = next(command for command in cluster["head_start_ray_commands"] if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in head
    assert "medfl-ray cluster node ~/medfl/secrets $(hostname -I) --out ~/medfl/node" in commands(cluster)[3]


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_each_hospital_has_a_node_that_stays(path):
    cluster = load(path)
    hospitals = {name: kind for name, kind in cluster["available_node_types"].items() if name != "head"}
    assert set(hospitals) == {"hospital_north", "hospital_south"}
    for name, kind in hospitals.items():
        assert kind["resources"][name.replace("_", ":")] == 1
        assert kind["min_workers"] == kind["max_workers"] == 1
    assert any("GPU" in kind["resources"] for kind in hospitals.values())
    assert cluster["provider"]["cache_stopped_nodes"] is True  # else ray down would throw the ledgers away


def test_the_variants_agree_where_they_should():
    clusters = [load(path) for path in FILES]
    for key in SHARED:
        assert all(cluster[key] == clusters[0][key] for cluster in clusters), key
    first, *others = (load(path) for path in CLOUDS)
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        assert all(cluster[key] == first[key] for cluster in others), key
    # With the other autoscaler the last of the machines never starts: seen in a rehearsal with Ray 2.55.1.
    start = load(ROOT / "deploy/ray/onpremise.yaml")["head_start_ray_commands"]
    assert [command.replace("RAY_enable_autoscaler_v2=0 ", "") for command in start] == first["head_start_ray_commands"]
    assert "export RAY_enable_autoscaler_v2=0 " in start[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_options_and_files_that_it_names_exist(path):
    import click
    from ray.scripts.scripts import start

    options = {option for parameter in start.params if isinstance(parameter, click.Option) for option in parameter.opts}
    cluster = load(path)
    for command in commands(cluster):
        used = re.findall(r"(--[a-z-]+)=", command.partition("ray start")[2])
        assert set(used) <= options, command
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0, command
    made = {"dist": "wheel:", "deploy/ray/secrets": "cluster secrets deploy/ray/secrets"}
    said = (ROOT / "Makefile").read_text() + path.read_text()
    for local in cluster["file_mounts"].values():
        assert (ROOT / local).exists() or made[local] in said
    assert re.search(r"^wheel:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_a_machine_of_your_own_says_which_hospitals_it_serves(tmp_path):
    start = load(ROOT / "deploy/ray/onpremise.yaml")["worker_start_ray_commands"][1]
    (tmp_path / "medfl-hospital").write_text("north\nsouth\n")
    (tmp_path / "medfl/node").mkdir(parents=True)
    (tmp_path / "medfl/node/ray.env").write_text("")
    (tmp_path / "medfl/env/bin").mkdir(parents=True)
    ray = tmp_path / "medfl/env/bin/ray"
    ray.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    ray.chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "RAY_HEAD_IP": "192.0.2.1"}
    said = subprocess.run(
        ["bash", "-c", start],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said[:2] == ["start", "--address=192.0.2.1:6379"]
    assert json.loads(said[2].partition("=")[2]) == {"hospital:north": 1, "hospital:south": 1}


def test_the_rehearsal_that_is_recorded_went_to_its_end():
    folder = ROOT / "deploy" / "ray"
    record = (folder / "rehearsal.log").read_text(encoding="utf-8")
    script = (folder / "rehearse.sh").read_text(encoding="utf-8")
    titles = re.findall(r"^ *say '(.*)'$", script, re.MULTILINE)
    assert len(titles) >= 9
    said = [line.removeprefix("=== ") for line in record.splitlines() if line.startswith("=== ")]
    assert said[:-1] == titles
    assert said[-1].startswith("over after ")
    assert "succeeded" in record
    assert re.search(r"processes of Ray before: [1-9]", record)
    assert re.search(r"processes of Ray \d+ s later: 0$", record, re.MULTILINE)
    installed = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert record.startswith(f"Ray {installed},")


def test_the_record_tells_nothing_of_the_machine_and_no_secret():
    record = (ROOT / "deploy" / "ray" / "rehearsal.log").read_text(encoding="utf-8")
    assert not re.findall(r"(?<!\w)/(?:root|home|work|var|tmp|opt|usr)/\S*", record)
    assert not re.findall(r"\b[0-9a-f]{64}\b|PRIVATE KEY", record)


def test_the_rehearsal_can_be_read_by_the_shell():
    assert subprocess.run(["bash", "-n", str(ROOT / "deploy/ray/rehearse.sh")], check=False).returncode == 0
