"""Several processes at once, and SIGKILL anywhere: unique numbers, one champion, no half version, one whole chain."""

import os
import signal
from pathlib import Path

import pytest
from model_registry import lineage, write_package

from medfl_ray.store.registry.registry import Registry

PROGRAM = Path(__file__).with_name("registry_process.py")
ROOT = Path(__file__).parents[2]
REGISTER = [
    "registry.migrate.before_commit",
    "registry.artifact.copied:2",
    "registry.artifact.kept:2",
    "registry.register.files",
    "registry.register.version",
    "registry.change.audited",
    "registry.change.between",
    "registry.change.before_commit",
    "registry.change.committed",
]
CHANGE = ["registry.change.audited", "registry.change.between", "registry.change.before_commit",
          "registry.change.committed"]  # fmt: skip
FETCH = ["registry.fetch.file", "registry.fetch.file:3", "registry.fetch.complete"]


def start(warm, place, package, action, count=1, actor="ada", failpoint=None, database=""):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment.pop("MEDFL_FAILPOINT", None)
    if failpoint is not None:
        environment["MEDFL_FAILPOINT"] = failpoint
    return warm.start(PROGRAM, place, database, package, action, count, actor, env=environment)


def lines_of(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode in (0, -signal.SIGKILL), err
    return out.splitlines()


def check_whole(registry):
    """Everything that is visible is whole, and there is at most one champion."""
    registry.verify()
    versions = registry.versions()
    assert [version.version for version in versions] == list(range(1, len(versions) + 1))
    assert sum(version.stage == "champion" for version in versions) <= 1
    return versions


@pytest.fixture
def package(tmp_path):
    return write_package(tmp_path / "run")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.ci)])
def database(request):
    return request.getfixturevalue("postgres")() if request.param == "postgresql" else ""


def test_processes_that_make_a_registry_together_share_one(warm, tmp_path, package, database):
    """From nothing: key, schema, versions and champions, by four processes at the same time."""
    place, rounds, actors = tmp_path / "registry", 3, ["ada", "bea", "cleo", "dee"]
    processes = [start(warm, place, package, "both", rounds, actor, database=database) for actor in actors]
    answers = [lines_of(process) for process in processes]
    assert all(lines[-1] == "done" for lines in answers)
    told = sorted(int(line.split()[1]) for lines in answers for line in lines if line.startswith("registered"))
    assert told == list(range(1, rounds * len(actors) + 1))
    registry = Registry(place, database or None)
    assert len(check_whole(registry)) == rounds * len(actors)
    assert registry.get("lesions").stage == "champion"
    log = registry.audit()
    assert {event.actor for event in log} == set(actors)
    done = sum(line in ("promoted", "rolled back") for lines in answers for line in lines)
    assert sum(event.action in ("model.promote", "model.rollback") for event in log) == done


def killed_while_registering(warm, tmp_path, package, failpoint, database=""):
    place = tmp_path / "registry"
    killed = start(warm, place, package, "register", failpoint=failpoint, database=database)
    told = lines_of(killed)
    assert killed.returncode == -signal.SIGKILL
    assert told == []
    registry = Registry(place, database or None)
    before = len(check_whole(registry))
    assert before == (1 if failpoint == "registry.change.committed" else 0)
    again = lines_of(start(warm, place, package, "both", actor="bea", database=database))
    assert again[0] == f"registered {before + 1}"
    assert len(check_whole(Registry(place, database or None))) == before + 1


def killed_while_changing(warm, tmp_path, package, action, failpoint, database=""):
    place = tmp_path / "registry"
    registry = Registry(place, database or None)
    for _ in range(2):
        registry.register("lesions", package, lineage(), "ada")
        registry.promote("lesions", "candidate", "ada")
    registry.register("lesions", package, lineage(), "ada")
    killed = start(warm, place, package, action, failpoint=failpoint, database=database)
    lines_of(killed)
    assert killed.returncode == -signal.SIGKILL
    check_whole(registry)
    after = {"promote": 3, "rollback": 1}[action]
    assert registry.get("lesions").version == (after if failpoint == "registry.change.committed" else 2)
    lines_of(start(warm, place, package, "both", actor="bea", database=database))
    check_whole(Registry(place, database or None))


def killed_while_fetching(warm, tmp_path, package, failpoint):
    place = tmp_path / "registry"
    version = Registry(place).register("lesions", package, lineage(), "ada")
    killed = start(warm, place, package, "fetch", failpoint=failpoint)
    lines_of(killed)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "fetched").exists()
    Registry(place).fetch(version, tmp_path / "fetched")


def test_killed_between_the_rows_of_one_promotion_the_champion_stays(warm, tmp_path, package):
    killed_while_changing(warm, tmp_path, package, "promote", "registry.change.between")


@pytest.mark.ci
@pytest.mark.parametrize("failpoint", REGISTER)
def test_killed_anywhere_while_registering(warm, tmp_path, package, failpoint, database):
    killed_while_registering(warm, tmp_path, package, failpoint, database)


@pytest.mark.ci
@pytest.mark.parametrize("failpoint", CHANGE)
@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_killed_anywhere_while_changing_the_champion(warm, tmp_path, package, action, failpoint, database):
    killed_while_changing(warm, tmp_path, package, action, failpoint, database)


@pytest.mark.ci
@pytest.mark.parametrize("failpoint", FETCH)
def test_killed_anywhere_while_fetching(warm, tmp_path, package, failpoint):
    killed_while_fetching(warm, tmp_path, package, failpoint)


def test_replicas_that_fetch_into_one_folder_share_it(warm, tmp_path, package):
    place = tmp_path / "registry"
    version = Registry(place).register("lesions", package, lineage(), "ada")
    processes = [start(warm, place, package, "fetch", count=3) for _ in range(3)]
    assert [lines_of(process) for process in processes] == [["done"]] * 3
    assert Registry(place).fetch(version, tmp_path / "fetched") == tmp_path / "fetched"
    assert not list(tmp_path.glob(".fetched*"))


def test_a_full_disk_while_registering_leaves_the_registry_as_it_was(tmp_path, package, monkeypatch):
    from medfl_ray.errors import RegistryError

    registry = Registry(tmp_path / "registry")
    registry.register("lesions", package, lineage(), "ada")
    monkeypatch.setenv("MEDFL_FAILPOINT", "registry.change.before_commit:1:enospc")
    with pytest.raises(RegistryError, match="No space left"):
        registry.register("lesions", package, lineage(), "ada")
    monkeypatch.delenv("MEDFL_FAILPOINT")
    assert len(check_whole(registry)) == 1
