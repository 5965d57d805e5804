"""Whoever can write the database or the files, and has no key, can break the registry and not choose its champion."""

import json
import shutil
import sqlite3
from contextlib import closing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_registry import lineage, write_package

from medfl_ray.errors import ArtifactDamaged, RegistryAltered, RegistryError
from medfl_ray.store.registry import audit_log as audit
from medfl_ray.store.registry.audit_log import AuditEvent, verify
from medfl_ray.store.registry.model_records import STATE_LABEL, VERSION_LABEL, ModelState, Sealed, VersionRecord
from medfl_ray.store.registry.package_files import verify_package
from medfl_ray.store.registry.registry import Registry
from medfl_ray.store.signing_key import create_key

TRIGGERS = ("audit_log_no_update", "audit_log_no_delete", "model_versions_no_update", "model_versions_no_delete")


@pytest.fixture
def place(tmp_path):
    """A registry with two versions, the second of which is champion after the first."""
    registry = Registry(tmp_path / "registry")
    for number, dice in enumerate((0.7, 0.8)):
        registry.register(
            "lesions", write_package(tmp_path / f"run-{number}", bytes([number]) * 100), lineage(dice), "ada"
        )
        registry.promote("lesions", "candidate", "ada")
    return tmp_path / "registry"


def edit(place, *statements):
    """Change the database as an attacker would, past the triggers."""
    with closing(sqlite3.connect(place / "registry.sqlite")) as connection, connection:
        for trigger in TRIGGERS:
            connection.execute(f"DROP TRIGGER IF EXISTS {trigger}")
        for statement in statements:
            connection.execute(*statement if isinstance(statement, tuple) else (statement,))


def rows(place, query):
    with closing(sqlite3.connect(place / "registry.sqlite")) as connection:
        return connection.execute(query).fetchall()


def state_of(place):
    return rows(place, "SELECT state, hash, signature FROM model_stages")[0]


def put_state(place, state):
    edit(place, ("UPDATE model_stages SET state = ?, hash = ?, signature = ?", state))


def refused_everywhere(place, match, tmp_path):
    """Nothing can be read, fetched, promoted or added; and the message names no path."""
    registry = Registry(place)
    attempts = (
        lambda: registry.get("lesions"),
        lambda: registry.promote("lesions", 1),
        lambda: registry.rollback("lesions"),
        lambda: registry.retire("lesions", 1, "a reason"),
        lambda: registry.register("lesions", tmp_path / "run-0", lineage()),
        registry.verify,
    )
    for attempt in attempts:
        with pytest.raises(RegistryAltered, match=match) as raised:
            attempt()
        assert str(tmp_path) not in str(raised.value)


def test_a_row_is_not_changed_by_mistake(place):
    for table in ("audit_log", "model_versions"):
        with closing(sqlite3.connect(place / "registry.sqlite")) as connection:
            for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET hash = 'x'"):
                with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                    connection.execute(statement)


def test_another_champion_in_the_row_is_refused(place, tmp_path):
    state, digest, signature = state_of(place)
    put_state(place, (json.dumps({**json.loads(state), "champion": 1}), digest, signature))
    refused_everywhere(place, "its contents do not match its hash", tmp_path)


def test_another_champion_with_a_matching_hash_is_refused(place, tmp_path):
    state = ModelState.model_validate_json(state_of(place)[0])
    sealed = Sealed.of(STATE_LABEL, state.promoted(1), create_key(tmp_path / "attackers.key"))
    put_state(place, (sealed.text, sealed.hash, sealed.signature))
    refused_everywhere(place, "not signed with the registry's key", tmp_path)


def test_the_row_of_an_earlier_champion_put_back_is_refused(place, tmp_path):
    earlier = state_of(place)
    registry = Registry(place)
    registry.register("lesions", write_package(tmp_path / "run-2", b"third"), lineage(0.9))
    registry.promote("lesions", 3)
    put_state(place, earlier)
    refused_everywhere(place, "is an old one", tmp_path)


def test_hiding_the_later_promotion_breaks_the_chain(place, tmp_path):
    registry = Registry(place)
    earlier = state_of(place)
    registry.register("lesions", write_package(tmp_path / "run-2", b"third"), lineage(0.9))
    registry.promote("lesions", 3)
    put_state(place, earlier)
    edit(place, "UPDATE audit_log SET action = 'model.look' WHERE sequence > 4")
    refused_everywhere(place, "row 5 of the audit log is bad: its contents", tmp_path)


@pytest.mark.parametrize("reopened", [True, False])
def test_an_old_copy_of_the_whole_database_is_refused(place, tmp_path, reopened):
    registry = Registry(place)
    registry.get("lesions")
    shutil.copy(place / "registry.sqlite", tmp_path / "old.sqlite")
    registry.register("lesions", write_package(tmp_path / "run-2", b"third"), lineage(0.9))
    registry.promote("lesions", 3)
    shutil.copy(tmp_path / "old.sqlite", place / "registry.sqlite")
    looking = Registry(place) if reopened else registry
    with pytest.raises(RegistryAltered, match="no longer holds row 6"):
        looking.get("lesions")


def test_a_reader_that_runs_finds_a_log_that_was_cut(place, tmp_path):
    reader = Registry(place, key_folder=tmp_path / "none", public_key=Registry(place).public_key)
    assert reader.get("lesions").version == 2
    edit(place, "DELETE FROM audit_log WHERE sequence = 4")
    with pytest.raises(RegistryAltered, match="no longer holds row 4, which this machine has seen"):
        reader.get("lesions")


def test_a_machine_that_only_reads_remembers_the_last_row_after_a_restart(place, tmp_path):
    url, key = f"sqlite:///{place / 'registry.sqlite'}", Registry(place).public_key
    writer, folder = Registry(place), tmp_path / "reader" / "state"
    shutil.copy(place / "registry.sqlite", tmp_path / "old.sqlite")
    writer.retire("lesions", 1, "a wrong label")
    assert len(Registry(place, url, folder, key).audit()) == 5
    shutil.copy(tmp_path / "old.sqlite", place / "registry.sqlite")
    with pytest.raises(RegistryAltered, match="no longer holds row 5, which this machine has seen"):
        Registry(place, url, folder, key).get("lesions")


def test_a_reader_whose_state_cannot_be_written_reads_on_and_says_so_once(place, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    reader = Registry(place, None, tmp_path / "file" / "state", Registry(place).public_key)
    for _ in range(3):
        assert reader.get("lesions").version == 2
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert str(tmp_path) not in caplog.text


@pytest.mark.parametrize("content", [b"", b"7", b"\xff\xfe", b"2:short"])
def test_a_torn_memory_of_the_last_row_is_one_sentence(place, content):
    (place / "audit.seen").write_bytes(content)
    with pytest.raises(RegistryError, match=r"audit\.seen"):
        Registry(place).get("lesions")


def test_an_empty_database_in_its_place_is_refused(place, tmp_path):
    for path in place.glob("registry.sqlite*"):
        path.unlink()
    with pytest.raises(RegistryAltered, match="no longer holds row 4"):
        Registry(place).register("lesions", tmp_path / "run-0", lineage())


def test_a_record_with_a_smaller_epsilon_is_refused(place):
    text = rows(place, "SELECT record FROM model_versions WHERE version = 2")[0][0]
    assert '"epsilon":2.0' in text
    edit(
        place,
        ("UPDATE model_versions SET record = ? WHERE version = 2", (text.replace('"epsilon":2.0', '"epsilon":1.0'),)),
    )
    for read in (lambda r: r.get("lesions"), lambda r: r.versions(), lambda r: r.verify(), lambda r: r.get_best()):
        with pytest.raises(RegistryAltered, match="version 2 of 'lesions' was altered"):
            read(Registry(place))


def test_a_record_signed_by_somebody_else_is_refused(place, tmp_path):
    record = VersionRecord.model_validate_json(rows(place, "SELECT record FROM model_versions WHERE version = 2")[0][0])
    sealed = Sealed.of(VERSION_LABEL, record, create_key(tmp_path / "attackers.key"))
    edit(
        place, ("UPDATE model_versions SET hash = ?, signature = ? WHERE version = 2", (sealed.hash, sealed.signature))
    )
    with pytest.raises(RegistryAltered, match=Registry(place).public_key[:16]):
        Registry(place).get("lesions")


def test_the_record_of_another_version_in_its_place_is_refused(place):
    edit(
        place,
        "UPDATE model_versions SET record = (SELECT record FROM model_versions WHERE version = 1), "
        "hash = (SELECT hash FROM model_versions WHERE version = 1), "
        "signature = (SELECT signature FROM model_versions WHERE version = 1) WHERE version = 2",
    )
    with pytest.raises(RegistryAltered, match="it is the record of version 1"):
        Registry(place).get("lesions")


def test_a_version_that_was_removed_is_missed(place, tmp_path):
    edit(place, "DELETE FROM model_versions WHERE version = 1")
    with pytest.raises(RegistryAltered, match="version 1, which was removed"):
        Registry(place).versions()
    Registry(place).register("lesions", write_package(tmp_path / "run-2", b"third"), lineage())
    assert rows(place, "SELECT version FROM model_versions ORDER BY version") == [(2,), (3,)]  # no number twice


def test_a_database_that_is_gone_is_not_an_empty_registry(place, tmp_path):
    running = Registry(place)
    assert running.names() == ["lesions"]
    place.rename(tmp_path / "unmounted")  # with the key and the note of the last row
    place.mkdir()
    for read in (running.names, running.versions, running.audit, running.verify):
        with pytest.raises(RegistryError, match=r"row 4 of its audit log was seen: its disk is not mounted"):
            read()
    (tmp_path / "unmounted" / "audit.seen").rename(place / "audit.seen")
    with pytest.raises(RegistryError, match="its disk is not mounted"):  # a process that starts now
        Registry(place).names()
    assert not (place / "registry.sqlite").exists()
    (place / "audit.seen").unlink()
    assert Registry(place).names() == []


def test_a_log_that_was_emptied_under_a_running_service_is_not_an_empty_registry(place):
    running = Registry(place)
    assert running.names() == ["lesions"]
    edit(place, "DELETE FROM audit_log", "DELETE FROM model_versions", "DELETE FROM model_stages")
    (place / "audit.seen").unlink()
    with pytest.raises(RegistryAltered, match="no longer holds row 4, which this process has seen"):
        running.versions()


def test_a_model_whose_row_of_stages_was_removed_is_missed(place, tmp_path):
    edit(place, "DELETE FROM model_stages")
    refused_everywhere(place, "row of stages of 'lesions' is", tmp_path)


def test_a_state_that_the_key_signed_and_the_log_does_not_lead_to_is_found(place):
    registry = Registry(place)
    state = ModelState.model_validate_json(state_of(place)[0])
    forged = state.model_copy(update={"champion": 1, "retired": (2,), "history": ()})
    sealed = Sealed.of(STATE_LABEL, forged, registry._key.for_writing(False))
    put_state(place, (sealed.text, sealed.hash, sealed.signature))
    with pytest.raises(RegistryAltered, match="not what the audit log leads to"):
        registry.verify()


def test_one_flipped_bit_in_a_file_stops_fetch_promotion_and_rollback(place, tmp_path):
    registry = Registry(place)
    earlier = registry.get("lesions", 1)
    blob = place / "blobs" / "sha256" / earlier.files["model.onnx"].sha256[:2] / earlier.files["model.onnx"].sha256
    content = bytearray(blob.read_bytes())
    content[50] ^= 4
    blob.write_bytes(content)
    for attempt in (
        lambda: registry.fetch(earlier, tmp_path / "out"),
        lambda: registry.rollback("lesions"),
        lambda: registry.promote("lesions", 1, override="it has to be this one"),
        registry.verify,
    ):
        with pytest.raises(ArtifactDamaged):
            attempt()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    assert registry.get("lesions").version == 2


def test_a_version_object_that_was_made_up_is_not_fetched(place, tmp_path):
    from dataclasses import replace

    registry = Registry(place)
    first, second = registry.get("lesions", 1), registry.get("lesions", 2)
    swapped = replace(second, record=second.record.model_copy(update={"files": first.files}))
    folder = registry.fetch(swapped, tmp_path / "out")  # what was signed counts, not what the object says
    assert (folder / "model.onnx").read_bytes() == (tmp_path / "run-1" / "model.onnx").read_bytes()
    with pytest.raises(RegistryAltered):
        registry.fetch(replace(second, seal=replace(second.seal, text=first.seal.text)), tmp_path / "other")


@pytest.mark.parametrize("name", ["model.onnx", "model.json", "card.md", "registry.json"])
def test_a_bit_that_flips_after_the_fetch_is_found_at_the_next_load(place, tmp_path, name):
    registry = Registry(place)
    folder = registry.fetch(registry.get("lesions"), tmp_path / "out")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(RegistryError):
        verify_package(folder, registry.public_key)
    if name != "registry.json":
        with pytest.raises(ArtifactDamaged):
            registry.fetch(registry.get("lesions"), folder)


def test_a_package_that_somebody_else_signed_is_refused_with_the_key(place, tmp_path):
    own = Registry(tmp_path / "own")
    folder = own.fetch(own.register("lesions", tmp_path / "run-0", lineage()), tmp_path / "out")
    verify_package(folder)
    with pytest.raises(RegistryAltered, match="not signed with the registry's key"):
        verify_package(folder, Registry(place).public_key)


def test_a_folder_with_another_file_is_not_taken_for_a_package(place, tmp_path):
    registry = Registry(place)
    folder = registry.fetch(registry.get("lesions"), tmp_path / "out")
    (folder / "libcustom.so").write_bytes(b"code")
    with pytest.raises(RegistryError, match=r"libcustom\.so"):
        registry.fetch(registry.get("lesions"), folder)


def test_without_its_key_a_registry_is_not_trusted_and_no_new_key_is_made(place, tmp_path):
    (place / "registry.key").unlink()
    for attempt in (
        lambda: Registry(place).get("lesions"),
        lambda: Registry(place).register("lesions", tmp_path / "run-0", lineage()),
    ):
        with pytest.raises(RegistryError, match=r"registry\.key"):
            attempt()
    assert not (place / "registry.key").exists()


def test_another_key_is_refused(place, tmp_path):
    (place / "registry.key").unlink()
    create_key(place / "registry.key")
    refused_everywhere(place, "row 1 of the audit log is bad: its signature", tmp_path)


def test_a_key_that_others_may_read_is_refused(place):
    (place / "registry.key").chmod(0o644)
    with pytest.raises(RegistryError, match="chmod 600"):
        Registry(place).get("lesions")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A log of six rows and the key that signed it."""
    folder = tmp_path_factory.mktemp("log")
    registry = Registry(folder / "registry")
    for number in range(3):
        registry.register("lesions", write_package(folder / "run", bytes([number])), lineage(), "ada")
        registry.promote("lesions", "candidate", "ada")
    return registry.audit(), registry.public_key


CHANGES = {
    "sequence": lambda value: value + 1,
    "at": lambda value: value.replace("20", "19", 1),
    "actor": lambda value: value + "x",
    "action": lambda value: "model.retire",
    "subject": lambda value: "organs",
    "details": lambda value: {**value, "version": 9},
    "previous_hash": lambda value: "0" * 63 + "1",
    "hash": lambda value: value[:-1] + ("0" if value[-1] != "0" else "1"),
    "signature": lambda value: value[:-1] + ("0" if value[-1] != "0" else "1"),
}


def test_every_field_can_be_changed():
    assert set(CHANGES) == set(AuditEvent.model_fields)


@given(position=st.integers(0, 5), field=st.sampled_from(sorted(CHANGES)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_any_change_of_any_row_is_found_and_the_first_bad_row_is_named(log, position, field):
    events, key = log
    changed = list(events)
    row = changed[position]
    changed[position] = row.model_copy(update={field: CHANGES[field](getattr(row, field))})
    with pytest.raises(RegistryAltered, match=f"row {position + 1} of the audit log is bad"):
        verify(changed, key)


@given(st.permutations(range(6)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_any_other_order_is_found(log, order):
    events, key = log
    shuffled = [events[i] for i in order]
    if order == sorted(order):
        assert verify(shuffled, key) == events[-1].head
        return
    first = next(i for i, position in enumerate(order) if i != position)
    with pytest.raises(RegistryAltered, match=f"row {first + 1} "):
        verify(shuffled, key)


@pytest.mark.parametrize("position", range(5))
def test_a_row_left_out_or_doubled_is_found(log, position):
    events, key = log
    for changed in (events[:position] + events[position + 1 :], events[: position + 1] + events[position:]):
        with pytest.raises(RegistryAltered):
            verify(changed, key)


def test_a_damaged_row_in_the_table_is_one_sentence(place, tmp_path):
    edit(place, "UPDATE audit_log SET details = 'no json' WHERE sequence = 2")
    refused_everywhere(place, "row 2 of the audit log is bad", tmp_path)


def test_a_damaged_database_file_is_one_sentence(place):
    path = place / "registry.sqlite"
    content = bytearray(path.read_bytes())
    content[4096:] = bytes(len(content) - 4096)
    path.write_bytes(content)
    for path in place.glob("registry.sqlite-*"):
        path.unlink()
    with pytest.raises(RegistryError):
        Registry(place).get("lesions")


def test_the_log_holds_no_path_and_no_file_of_the_run(place, tmp_path):
    text = json.dumps([event.model_dump() for event in Registry(place).audit()])
    assert str(tmp_path) not in text
    assert "run-0" not in text
    assert audit.FIRST.hash in text
