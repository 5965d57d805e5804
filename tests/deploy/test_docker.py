"""Every image, file, path and command in the Dockerfiles and the compose file is one that the project has."""

import json
import re
import shlex
from pathlib import Path

import click
import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "docker"
DOCKERFILES = sorted(FOLDER.glob("Dockerfile*"))
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
MADE = {"dist/medfl_ray-*.whl": "wheel:"}
TEXTS = {"type": "array", "items": {"type": "string"}}
MAPPING = {"type": "object", "additionalProperties": {"type": "string"}}


def strict(**properties):
    return {"type": "object", "properties": properties, "additionalProperties": False}


# The part of the Compose specification that the file uses.
NODE = strict(
    image={"type": "string"},
    build=strict(context={"type": "string"}, dockerfile={"type": "string"}),
    user={"type": "string"},
    hostname={"type": "string"},
    networks=TEXTS,
    read_only={"type": "boolean"},
    cap_drop=TEXTS,
    security_opt=TEXTS,
    tmpfs=TEXTS,
    shm_size={"type": "string", "pattern": "^[0-9]+[kmg]b$"},
    restart={"enum": ["no", "always", "on-failure", "unless-stopped"]},
    environment=MAPPING,
    secrets={
        "type": "array",
        "items": strict(source={"type": "string"}, uid={"type": "string"}, mode={"type": "integer"}),
    },
    command=TEXTS,
    ports={"type": "array", "items": {"type": "string", "pattern": r"^[\d.]+:\d+:\d+$"}},
    volumes=TEXTS,
    healthcheck=strict(
        test=TEXTS, interval={"type": "string"}, timeout={"type": "string"}, retries={"type": "integer"}
    ),
    depends_on={"type": "object", "additionalProperties": strict(condition={"const": "service_healthy"})},
)
SCHEMA = {
    **strict(
        name={"type": "string"},
        services={"type": "object", "additionalProperties": NODE},
        networks={"type": "object", "additionalProperties": strict(internal={"type": "boolean"})},
        volumes={"type": "object", "additionalProperties": strict()},
        secrets={"type": "object", "additionalProperties": strict(file={"type": "string"})},
    ),
    "patternProperties": {"^x-": NODE},
}


def instructions(path):
    joined = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def assert_command_exists(words):
    """Judge a command by the parsers of Ray and of the project."""
    from ray.scripts.scripts import cli as ray_cli
    from typer.main import get_command

    from medfl_ray.cli.main import app

    group = {"ray": ray_cli, "medfl-ray": get_command(app)}[words[0]]
    command = group.commands[words[1]]
    command.make_context(words[1], list(words[2:]), resilient_parsing=False)


def test_the_compose_file_has_fields_that_are_known():
    jsonschema.validate(COMPOSE, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**COMPOSE, "services": {"head": {**COMPOSE["services"]["head"], "port": []}}}, SCHEMA)
    for service in COMPOSE["services"].values():
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        assert {secret["source"] for secret in service["secrets"]} <= set(COMPOSE["secrets"])
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_copies_exists_or_is_made(path):
    makefile = (ROOT / "Makefile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().split()
    for word, rest in instructions(path):
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists() or re.search(f"^{MADE[source]}", makefile, re.MULTILINE), source
                assert f"!{source.split('/')[0]}" in {line.rstrip("/") for line in ignored}, source


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_has_the_projects_python_and_runs_its_command_as_nobody_special(path):
    said = instructions(path)
    project = (ROOT / "pyproject.toml").read_text()
    python = re.match(r"python:(\d+\.\d+)-", dict(said)["FROM"])[1]
    assert f'requires-python = ">={python}"' in project
    assert [rest for word, rest in said if word == "USER"] == ["medfl"]
    command = json.loads(dict(said)["CMD"])
    assert_command_exists(command)
    version = re.search(r'^version = "(.+)"', project, re.MULTILINE)[1]
    assert re.search(
        rf"^#   docker build -f deploy/docker/{path.name} -t medfl-ray:{version}(-cuda)? \.$",
        path.read_text(),
        re.MULTILINE,
    )
    environment = dict(pair.split("=") for word, rest in said if word == "ENV" for pair in shlex.split(rest))
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["GRPC_ENABLE_FORK_SUPPORT"] == "0"


def test_the_two_images_differ_in_the_libraries_alone():
    cpu, cuda = (instructions(path) for path in DOCKERFILES)
    differing = [pair for pair in cpu if pair not in cuda]
    assert [word for word, _ in differing] == ["RUN"]
    assert "pip install" in differing[0][1]


def test_commands_of_the_containers_are_rays_and_ask_for_a_token():
    for name, service in COMPOSE["services"].items():
        assert_command_exists(service["command"])
        assert service["image"] == "medfl-ray:0.1.0"
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        secret = service["secrets"][0]
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == f"/run/secrets/{secret['source']}"
        if name != "head":
            resources = next(word for word in service["command"] if word.startswith("--resources="))
            assert json.loads(resources.partition("=")[2]) == {f"hospital:{name}": 1}
            assert service["networks"] == ["cluster"]
            assert "ports" not in service
    assert COMPOSE["networks"]["cluster"]["internal"] is True
    check = COMPOSE["services"]["head"]["healthcheck"]["test"]
    assert check[0] == "CMD"
    assert_command_exists(check[1:])


def test_ports_are_published_on_loopback_and_images_only_to_their_hospital():
    head = COMPOSE["services"]["head"]
    assert all(port.startswith("127.0.0.1:") for port in head["ports"])
    for name in ("north", "south"):
        volumes = COMPOSE["services"][name]["volumes"]
        assert volumes == [f"../../data/{name}:/opt/medfl/data/{name}:ro", f"state-{name}:/var/lib/medfl"]
    named = {volume.partition(":")[0] for service in COMPOSE["services"].values() for volume in service["volumes"]}
    assert {volume for volume in named if "/" not in volume} == set(COMPOSE["volumes"])


def test_what_the_comments_tell_to_type_exists():
    text = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
    typed = re.findall(r"^#   (.+)$", text, re.MULTILINE)
    build = COMPOSE["services"]["head"]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).resolve() == (FOLDER / "Dockerfile").resolve()
    for line in typed:
        words = shlex.split(line)
        if words[0] == "docker" and "exec" in words:
            words = words[words.index("head") + 1 :]
            assert (ROOT / words[2]).exists()
        if words[0] == "medfl-ray":
            assert_command_exists(words)
        elif words[0] == "make":
            assert re.search(f"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        else:
            assert words[:4] == ["docker", "compose", "-f", "deploy/docker/compose.yaml"]
    secrets = COMPOSE["secrets"]["auth_token"]["file"]
    assert f"medfl-ray cluster secrets deploy/docker/{secrets.partition('/')[0]}" in text


def test_a_wrong_command_is_found():
    with pytest.raises(click.UsageError):
        assert_command_exists(["ray", "start", "--heads"])
