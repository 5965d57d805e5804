"""The registry's contract, on SQLite and on a real PostgreSQL: versions, stages, the gate, rollback, fetch, audit."""

import json
from pathlib import Path

import pytest
from model_registry import figure, lineage, write_package
from sqlalchemy import create_engine

from medfl_ray.errors import PromotionRefused, RegistryError
from medfl_ray.store.registry.database import SCHEMA_VERSION, Database
from medfl_ray.store.registry.package_files import verify_package
from medfl_ray.store.registry.promotion import Gate
from medfl_ray.store.registry.registry import Registry
from medfl_ray.store.tables import registry_metadata


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.ci)])
def registry(request, tmp_path):
    url = request.getfixturevalue("postgres")() if request.param == "postgresql" else None
    return Registry(tmp_path / "registry", url)


@pytest.fixture
def package(tmp_path):
    return write_package(tmp_path / "run")


def stages(registry, name="lesions"):
    return [version.stage for version in registry.versions(name)]


def test_versions_are_numbered_and_keep_their_lineage(registry, package):
    first = registry.register("lesions", package, lineage(0.7), "ada")
    second = registry.register("lesions", package, lineage(0.8), "ada")
    other = registry.register("organs", package, lineage(0.9), "ada")
    assert [str(v) for v in (first, second, other)] == ["lesions/1", "lesions/2", "organs/1"]
    assert registry.names() == ["lesions", "organs"]
    found = Registry(registry._artifacts.local_folder, registry._database._url.render_as_string(False)).get(
        "lesions", 1
    )
    assert found == first
    assert found.lineage == lineage(0.7)
    assert (found.stage, found.record.actor) == ("candidate", "ada")
    assert registry.get("lesions", "2") == registry.get("lesions", "candidate") == second


def test_only_a_packages_own_files_are_kept(registry, package, tmp_path):
    version = registry.register("lesions", package, lineage())
    assert set(version.files) == {"model.json", "model.onnx", "model.int8.onnx", "card.md"}
    assert b"a secret" not in b"".join(
        p.read_bytes() for p in (tmp_path / "registry" / "blobs").rglob("*/*") if p.is_file()
    )


def test_stages_go_from_candidate_over_champion_to_retired(registry, package):
    for dice in (0.7, 0.8, 0.9):
        registry.register("lesions", package, lineage(dice))
    registry.promote("lesions", 1)
    assert stages(registry) == ["champion", "candidate", "candidate"]
    registry.promote("lesions", 2)
    registry.promote("lesions", "candidate")
    assert stages(registry) == ["retired", "retired", "champion"]
    assert registry.get("lesions").version == 3
    assert registry.get("lesions", "retired").version == 2


def test_rollback_goes_back_champion_by_champion(registry, package):
    for dice in (0.7, 0.8, 0.9):
        registry.register("lesions", package, lineage(dice))
        registry.promote("lesions", "candidate")
    assert registry.rollback("lesions", "ada", "blurred edges").version == 2
    assert stages(registry) == ["retired", "champion", "retired"]
    assert registry.rollback("lesions").version == 1
    with pytest.raises(RegistryError, match="no earlier champion"):
        registry.rollback("lesions")
    assert [event.details.get("reason") for event in registry.audit() if event.action == "model.rollback"] == [
        "blurred edges",
        None,
    ]


def test_rollback_passes_over_a_withdrawn_version(registry, package):
    for dice in (0.7, 0.8, 0.9):
        registry.register("lesions", package, lineage(dice))
        registry.promote("lesions", "candidate")
    registry.retire("lesions", 2, "trained on a wrong label")
    assert registry.rollback("lesions").version == 1


def test_a_retired_version_comes_back_only_with_a_reason(registry, package):
    registry.register("lesions", package, lineage())
    registry.retire("lesions", 1, "a wrong label")
    with pytest.raises(RegistryError, match="retired already"):
        registry.retire("lesions", 1, "again")
    with pytest.raises(PromotionRefused, match="was retired"):
        registry.promote("lesions", 1)
    registry.promote("lesions", 1, override="the label was right after all")
    assert stages(registry) == ["champion"]


def test_only_a_decision_withdraws_and_only_a_promotion_takes_it_back(registry, package):
    def withdrawn():
        registry.verify()  # the log leads to the same
        return [version.version for version in registry.versions("lesions") if version.withdrawn]

    for dice in (0.7, 0.8):
        registry.register("lesions", package, lineage(dice))
        registry.promote("lesions", "candidate")
    assert withdrawn() == []  # version 1 is retired
    registry.rollback("lesions")
    assert withdrawn() == []  # version 2 is
    assert registry.retire("lesions", 2, "blurred edges").withdrawn
    assert withdrawn() == [2]
    registry.promote("lesions", 2, override="not blurred after all")
    assert withdrawn() == []


def test_the_champion_is_withdrawn_only_where_that_is_said(registry, package):
    registry.register("lesions", package, lineage())
    registry.promote("lesions", 1)
    with pytest.raises(RegistryError, match="leave-none"):
        registry.retire("lesions", 1, "a patient withdrew consent")
    registry.retire("lesions", 1, "a patient withdrew consent", leave_none=True)
    assert stages(registry) == ["retired"]
    with pytest.raises(RegistryError, match="no version 'champion'"):
        registry.get("lesions")


def test_a_refusal_is_audited_and_an_override_keeps_its_reason(registry, package):
    registry.register("lesions", package, lineage(0.8))
    registry.promote("lesions", 1)
    registry.register("lesions", package, lineage(0.5))
    with pytest.raises(PromotionRefused, match=r"0\.5000, the champion's 0\.8000"):
        registry.promote("lesions", 2, "bea")
    assert stages(registry) == ["champion", "candidate"]
    decision = registry.promote("lesions", 2, "bea", override="the champion fails on the new scanner")
    assert not decision.allowed
    assert stages(registry) == ["retired", "champion"]
    refused, overridden = registry.audit("lesions")[-2:]
    assert (refused.action, refused.actor, refused.details["version"]) == ("model.refuse", "bea", 2)
    assert overridden.action == "model.promote"
    assert overridden.details["override"] == "the champion fails on the new scanner"
    assert overridden.details["checks"] == refused.details["checks"]


def test_an_override_that_was_not_needed_is_not_recorded_as_one(registry, package):
    registry.register("lesions", package, lineage(0.8))
    registry.promote("lesions", 1, override="just in case")
    assert "override" not in registry.audit()[-1].details


def test_the_best_is_found_among_those_that_show_the_figure(registry, package):
    registry.register("lesions", package, lineage(0.7))
    registry.register("lesions", package, lineage(None))
    registry.register("organs", package, lineage(0.9, task="classification"))
    registry.register("organs", package, lineage(0.95))
    registry.retire("organs", 2, "a wrong label")
    assert str(registry.get_best("dice", "segmentation")) == "lesions/1"
    assert str(registry.get_best("dice")) == "organs/1"
    with pytest.raises(RegistryError, match="shows 'auc'"):
        registry.get_best("auc")


def test_the_best_of_a_loss_is_the_lowest_and_equals_are_won_by_the_newest(registry, package):
    for loss in (0.3, 0.2, 0.2, 0.4):
        registry.register("lesions", package, lineage(metrics={"loss": figure(loss)}))
    assert registry.get_best("loss").version == 3


def test_a_fetched_package_is_what_was_registered(registry, package, tmp_path):
    version = registry.register("lesions", package, lineage())
    folder = registry.fetch(version, tmp_path / "out" / "lesions")
    assert {path.name for path in folder.iterdir()} == {*version.files, "registry.json"}
    for name in version.files:
        assert (folder / name).read_bytes() == (package / name).read_bytes()
    record, key = verify_package(folder, registry.public_key)
    assert (record, key) == (version.record, registry.public_key)
    assert registry.fetch(version, folder) == folder  # a second replica finds it there


def test_verify_reads_everything(registry, package):
    registry.register("lesions", package, lineage())
    registry.promote("lesions", 1)
    registry.register("lesions", package, lineage(0.1))
    with pytest.raises(PromotionRefused):
        registry.promote("lesions", 2)
    registry.retire("lesions", 2, "too poor")
    assert registry.verify() == (5, 2)
    assert [event.sequence for event in registry.audit()] == [1, 2, 3, 4, 5]


def test_a_registry_that_nobody_wrote_to_is_empty_and_not_made(tmp_path):
    registry = Registry(tmp_path / "registry")
    assert (registry.names(), registry.versions(), registry.audit(), registry.verify()) == ([], [], [], (0, 0))
    with pytest.raises(RegistryError, match="has no model 'lesions'"):
        registry.get("lesions")
    assert not (tmp_path / "registry").exists()


def test_files_on_s3_and_records_in_postgresql(bucket, postgres, package, tmp_path):
    url, keys = postgres(), tmp_path / "keys"
    registry = Registry(bucket, url, key_folder=keys)
    registry.register("lesions", package, lineage())
    registry.promote("lesions", 1)
    reader = Registry(bucket, url, key_folder=tmp_path / "no-key", public_key=registry.public_key)
    folder = reader.fetch(reader.get("lesions"), tmp_path / "out")
    assert (folder / "model.onnx").read_bytes() == (package / "model.onnx").read_bytes()
    assert reader.verify() == (2, 1)
    with pytest.raises(RegistryError, match="can read and not write"):
        reader.retire("lesions", 1, "no key here", leave_none=True)


def test_files_on_a_server_need_a_database_of_their_own(bucket):
    with pytest.raises(RegistryError, match="MEDFL_REGISTRY_DATABASE"):
        Registry(bucket)


@pytest.mark.parametrize("url", ["mysql://host/models", "sqlite://", "nonsense", "sqlite:///:memory:"])
def test_another_database_is_refused(tmp_path, url):
    with pytest.raises(RegistryError, match="sqlite:///FILE"):
        Registry(tmp_path, url)


def test_a_database_that_does_not_answer_is_one_sentence_without_its_password(tmp_path, package):
    registry = Registry(tmp_path / "registry", "postgresql://medfl:hunter2@127.0.0.1:9/models")
    with pytest.raises(RegistryError) as raised:
        registry.register("lesions", package, lineage())
    assert "PostgreSQL" in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_a_wrong_password_is_one_sentence_without_it(postgres, tmp_path, package):
    registry = Registry(tmp_path / "registry", postgres().replace("only-for-tests", "hunter2"))
    with pytest.raises(RegistryError, match="user, the password") as raised:
        registry.register("lesions", package, lineage())
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "Upper", "-dash", "x" * 65, "a b"])
def test_a_name_that_cannot_stand_in_a_url_is_refused(tmp_path, package, name):
    with pytest.raises(RegistryError, match="cannot be a model's name"):
        Registry(tmp_path / "registry").register(name, package, lineage())
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize("actor", ["", "Ada Lovelace", "x" * 65, "a\nb"])
def test_an_actor_is_the_name_of_an_account(tmp_path, package, actor):
    with pytest.raises(RegistryError, match="name of an account"):
        Registry(tmp_path / "registry").register("lesions", package, lineage(), actor)


@pytest.mark.parametrize("reason", ["", "  ", "two\nlines", "x" * 501])
def test_a_reason_is_one_line(registry, package, reason):
    registry.register("lesions", package, lineage())
    with pytest.raises(RegistryError, match="the reason"):
        registry.retire("lesions", 1, reason)


def remove_model(package):
    (package / "model.onnx").unlink()


def exchange_model(package):
    (package / "model.onnx").write_bytes(b"another")


def link_card(package):
    (package / "card.md").unlink()
    (package / "card.md").symlink_to(package / "coordinator.key")


def old_description(package):
    (package / "model.json").write_text(json.dumps({"format": 1}))


def no_description(package):
    (package / "model.json").unlink()


@pytest.mark.parametrize("damage", [remove_model, exchange_model, link_card, old_description, no_description])
def test_a_package_that_is_not_whole_is_refused(tmp_path, package, damage):
    damage(package)
    registry = Registry(tmp_path / "registry")
    with pytest.raises(RegistryError):
        registry.register("lesions", package, lineage())
    assert registry.versions() == []


def test_a_file_that_changes_while_it_is_registered_is_refused(tmp_path, package, monkeypatch):
    from medfl_ray.store.registry.artifacts import ArtifactStore

    put = ArtifactStore.put

    def put_late(store, path):
        if path.name == "model.onnx":
            path.write_bytes(b"written by another export in this moment")
        return put(store, path)

    monkeypatch.setattr(ArtifactStore, "put", put_late)
    with pytest.raises(RegistryError, match="not the file that"):
        Registry(tmp_path / "registry").register("lesions", package, lineage())
    assert Registry(tmp_path / "registry").versions() == []


def test_an_onnx_file_that_the_description_does_not_name_stays_out(tmp_path, package):
    (package / "model.float16.onnx").write_bytes(b"left from an earlier export")
    version = Registry(tmp_path / "registry").register("lesions", package, lineage())
    assert "model.float16.onnx" not in version.files


def test_the_gates_defaults_ask_for_a_known_figure(registry, package):
    registry.register("lesions", package, lineage(None))
    with pytest.raises(PromotionRefused, match="suppressed"):
        registry.promote("lesions", 1)
    registry.promote("lesions", 1, gate=Gate(when_unknown="allow"))
    assert stages(registry) == ["champion"]


def test_the_migrations_make_the_tables_of_the_code(registry, package):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    registry.register("lesions", package, lineage())
    with registry._database.reading() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), registry_metadata)
    assert differences == []
    folder = Path(__file__).parents[2] / "medfl_ray" / "store" / "migrations"
    assert ScriptDirectory(str(folder)).get_current_head() == SCHEMA_VERSION


def test_a_database_of_a_newer_version_is_refused(tmp_path, package):
    url = f"sqlite:///{tmp_path / 'registry.sqlite'}"
    with Database(url).writing():
        pass
    with create_engine(url).begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(RegistryError, match="9999"):
        Registry(tmp_path / "registry", url).versions()


def test_another_processs_lock_is_waited_for_and_then_named(tmp_path):
    url = f"sqlite:///{tmp_path / 'registry.sqlite'}"
    waiting = Database(url, lock_timeout_s=0.1)
    with Database(url).writing(), pytest.raises(RegistryError, match="another process holds it"), waiting.writing():
        pass
