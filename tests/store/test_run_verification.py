"""Verification that can fail: exports signed anew, cut, left out or added, with a mirror, receipts, or neither."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_run

from medfl_ray.cli.privacy_ledger import verify as verify_ledgers
from medfl_ray.cli.receipts import verify as verify_receipts_command
from medfl_ray.config.files import dump_yaml
from medfl_ray.errors import LedgerError, ReceiptError
from medfl_ray.messages import Mechanism, Receipt
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.events import LedgerEvent, genesis
from medfl_ray.store.ledger.mirror import LedgerMirror
from medfl_ray.store.ledger.mirror_file import MIRROR_NAME
from medfl_ray.store.ledger.recovery import recover
from medfl_ray.store.run.receipts import FIRST, sign_receipt
from medfl_ray.store.signing_key import SigningKey

DELTA = 1e-5
MECHANISM = Mechanism(
    noise_multiplier=20.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=2, num_patients=40, delta=DELTA
)
HOSPITALS = ("north", "south")
COORDINATOR, STRANGER = SigningKey.from_seed(b"c" * 32), SigningKey.from_seed(b"s" * 32)


class World:
    """A finished run, its hospitals' state folders and the coordinator's, as a run leaves them."""

    def __init__(self, folder: Path, declared: str) -> None:
        self.folder, self.run, self.root = folder, folder / "runs" / "20260101-000000-study", folder / "medfl-ray"
        self.run.mkdir(parents=True)
        self.mirror_folder = self.run / "mirror" if declared == "synthetic" else self.root / "_mirror"
        (self.run / "config.yaml").write_text(
            dump_yaml(small_run(privacy={"enable_dp": True, "noise_multiplier": 20.0}))
        )
        self.write("hospitals.json", {name: {"declared": declared} for name in HOSPITALS})
        self.receipts: list[Receipt] = []
        for number in (1, 2):
            self.train(number, "study")
        for name in HOSPITALS:  # a baseline, behind the last receipt
            ledger = self.ledger(name)
            ledger.settle(ledger.reserve("study/local", 1, 1, MECHANISM, None))
        self.export()

    def ledger(self, name: str) -> PrivacyLedger:
        (self.folder / name).mkdir(exist_ok=True, mode=0o700)
        return PrivacyLedger.open(self.folder / name / "ledger.sqlite", name, "scans", DELTA, None)

    def train(self, number: int, job: str) -> None:
        spent = {}
        for name in HOSPITALS:
            ledger = self.ledger(name)
            ledger.settle(ledger.reserve(job, number, 1, MECHANISM, None))
            spent[name] = ledger.spent()
            LedgerMirror(self.mirror_folder).keep(ledger.export())
        self.receipts.append(
            Receipt(
                job=job, round=number, attempt=1, plan_hash="p", config_hash="c", asked=HOSPITALS, trained=HOSPITALS,
                failures=(), update_hashes={}, spent=spent, weights_before=f"w{number - 1}",
                weights_after=f"w{number}", published=True, ended_at="2026-01-01T00:00:00+00:00",
            )
        )  # fmt: skip
        self.write_receipts(self.receipts, COORDINATOR)

    def write_receipts(self, receipts: list[Receipt], key: SigningKey) -> None:
        lines, previous = [], FIRST
        for receipt in receipts:
            signed, previous = sign_receipt(receipt, previous, key)
            lines.append(signed.model_dump_json() + "\n")
        (self.run / "receipts.jsonl").write_text("".join(lines))

    def export(self) -> None:
        exports = {name: self.ledger(name).export() for name in HOSPITALS}
        self.write("ledger.json", exports)
        for export in exports.values():
            LedgerMirror(self.mirror_folder).keep(export)

    def write(self, name: str, content: Any) -> None:
        (self.run / name).write_text(json.dumps(content))

    @property
    def exports(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.run / "ledger.json").read_text())
        return content

    def forge(self, name: str, change: Callable[[list[LedgerEvent]], list[LedgerEvent]], key: SigningKey) -> None:
        """Rewrite a hospital's export and seal it anew."""
        exports = self.exports
        exports[name] = sealed(exports[name], change, key)
        self.write("ledger.json", exports)

    def forget_mirrors(self) -> None:
        shutil.rmtree(self.mirror_folder)

    def forget_receipts(self) -> None:
        (self.run / "receipts.jsonl").unlink()


def sealed(
    export: dict[str, Any], change: Callable[[list[LedgerEvent]], list[LedgerEvent]], key: SigningKey
) -> dict[str, Any]:
    head, rows = genesis(export["hospital"], export["data_set"]), []
    for event in change([LedgerEvent.from_mapping(row) for row in export["events"]]):
        event = dataclasses.replace(event, sequence=head.sequence + 1, previous_hash=head.hash).sealed(key)
        head = event.head
        rows.append(event.to_dict())
    return {**export, "events": rows, "public_key": key.public_key, "head": str(head)}


def unchanged(events: list[LedgerEvent]) -> list[LedgerEvent]:
    return events


def less_noise_claimed(events: list[LedgerEvent]) -> list[LedgerEvent]:
    return [dataclasses.replace(event, noise_multiplier=90.0) if event.noise_multiplier else event for event in events]


def without_the_baseline(events: list[LedgerEvent]) -> list[LedgerEvent]:
    return events[:-2]


@pytest.fixture(params=["synthetic", "private"])
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("MEDFL_STATE_DIR", str(tmp_path))
    return World(tmp_path, request.param)


@pytest.fixture
def synthetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("MEDFL_STATE_DIR", str(tmp_path))
    return World(tmp_path, "synthetic")


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("MEDFL_STATE_DIR", str(tmp_path))
    return World(tmp_path, "private")


def both_fail(world: World, words: str, **more: Any) -> None:
    with pytest.raises(LedgerError, match=words):
        verify_ledgers(world.run, **more)
    with pytest.raises(ReceiptError, match=words):
        verify_receipts_command(world.run, **{name: value for name, value in more.items() if name != "key"})


def both_pass(world: World, **more: Any) -> None:
    verify_ledgers(world.run, **more)
    verify_receipts_command(world.run, **{name: value for name, value in more.items() if name != "key"})


def test_a_genuine_run_passes_and_each_hospital_is_named_once(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    both_pass(world)
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if line.startswith("hospital ")]
    assert [line.split(",")[0] for line in named] == ["hospital north", "hospital south"]
    assert all("6 rows are whole and signed; compared with the mirror in" in line for line in named)
    assert all("and 2 receipts" in line for line in named)
    assert any("whoever can write the run's folder" in line for line in lines) == (
        world.mirror_folder.parent == world.run
    )
    assert "the ledgers of 2 hospitals hold every row that the receipts name" in lines


@pytest.mark.parametrize("change", [unchanged, less_noise_claimed, without_the_baseline, lambda events: []])
def test_hole_an_export_signed_with_another_key_contradicts_the_mirror(
    world: World, change: Callable[[list[LedgerEvent]], list[LedgerEvent]]
) -> None:
    world.forge("north", change, STRANGER)
    both_fail(world, "'north', data set 'scans' is signed with the key .* not pinned in the mirror .* somebody else")


def test_hole_an_export_signed_with_another_key_contradicts_the_receipts(world: World) -> None:
    world.forget_mirrors()
    both_pass(world)
    world.forge("north", less_noise_claimed, STRANGER)
    both_fail(world, "the receipt of round 1 names a row that the ledger of north does not have: row 2")


def test_hole_an_export_that_its_own_hospital_signed_anew_contradicts_the_mirror(world: World) -> None:
    """Not even the hospital can show others less than it has shown the coordinator."""
    from medfl_ray.store.signing_key import load_key

    world.forget_receipts()
    world.forge("north", less_noise_claimed, load_key(world.folder / "north" / "hospital.key"))
    with pytest.raises(LedgerError, match=r"contradicts the mirror in .* from row 1 on"):
        verify_ledgers(world.run)


def test_hole_charges_cut_behind_the_last_receipt_are_missed(world: World) -> None:
    exports = world.exports
    exports["north"]["events"] = exports["north"]["events"][:4]
    last = exports["north"]["events"][-1]
    exports["north"]["head"] = f"{last['sequence']}:{last['hash']}"
    world.write("ledger.json", exports)
    both_fail(world, "ends at row 4 and the mirror in .* goes on to row 6 with rows of this run: the export was cut")


def test_hole_rows_cut_before_the_last_receipt_are_missed_without_a_mirror(world: World) -> None:
    world.forget_mirrors()
    exports = world.exports
    exports["north"]["events"] = exports["north"]["events"][:3]
    last = exports["north"]["events"][-1]
    exports["north"]["head"] = f"{last['sequence']}:{last['hash']}"
    world.write("ledger.json", exports)
    both_fail(world, "round 2 names a row that the ledger of north does not have: row 4")


def test_hole_a_copied_hash_beside_other_contents_is_no_row(world: World) -> None:
    """A check of the hash field alone would find every hash that receipts name."""
    world.forget_mirrors()
    exports = world.exports
    for row in exports["north"]["events"]:
        row["noise_multiplier"] = 90.0 if row["noise_multiplier"] else None
    world.write("ledger.json", exports)
    both_fail(world, "row 1 .* its contents do not match its hash")


@pytest.mark.parametrize("remaining", [{}, {"north": {}}, None])
def test_hole_a_missing_export_fails(world: World, remaining: dict[str, Any] | None) -> None:
    if remaining is None:
        (world.run / "ledger.json").unlink()
    else:
        world.write("ledger.json", {**remaining} if not remaining else {**world.exports, **remaining})
    both_fail(world, "the export of hospital 'north' is missing although the receipt of round 2 names a row")
    world.forget_receipts()
    with pytest.raises(LedgerError, match="'north' is missing although the run has patient-level differential privacy"):
        verify_ledgers(world.run)


def test_hole_an_added_export_of_a_hospital_that_nobody_knows_fails(world: World) -> None:
    forged = sealed({**world.exports["north"], "hospital": "west"}, lambda events: [
        dataclasses.replace(event, hospital="west") for event in events
    ], STRANGER)  # fmt: skip
    world.write("ledger.json", {**world.exports, "west": forged})
    both_fail(world, "nothing says with which key hospital 'west' signs")
    empty = sealed(forged, lambda events: [], STRANGER)
    world.write("ledger.json", {**world.exports, "west": empty})
    both_fail(world, "nothing says with which key hospital 'west' signs")


def test_hole_an_export_under_another_hospitals_name_fails(world: World) -> None:
    exports = world.exports
    world.write("ledger.json", {"north": exports["north"], "south": exports["north"]})
    both_fail(world, "under the name 'south' is of hospital 'north'")


def test_an_export_with_nothing_to_pin_its_key_asks_for_something(world: World) -> None:
    world.forget_mirrors()
    world.forget_receipts()
    with pytest.raises(
        LedgerError, match=r"nothing says with which key hospital 'north' signs.*--mirror.*--key north="
    ):
        verify_ledgers(world.run)
    north, south = (world.exports[name]["public_key"] for name in HOSPITALS)
    verify_ledgers(world.run, key=[f"north={north}", f"south={south.upper()}"])
    verify_ledgers(world.run, key=[north, south])
    for wrong in ([f"north={south}", f"south={south}"], [south], [f"north={south}", south]):
        with pytest.raises(LedgerError, match=r"'north' is signed with the key .* not the one given with --key"):
            verify_ledgers(world.run, key=wrong)
    with pytest.raises(LedgerError, match="not a public key"):
        verify_ledgers(world.run, key=["north=beef"])


def test_hole_a_stranger_who_signs_everything_in_the_folder_anew_fails_against_a_key_from_elsewhere(
    synthetic: World,
) -> None:
    keys = {name: export["public_key"] for name, export in synthetic.exports.items()}
    genuine = synthetic.mirror_folder.rename(synthetic.folder / "kept elsewhere")
    for name in HOSPITALS:
        synthetic.forge(name, less_noise_claimed, STRANGER)
        LedgerMirror(synthetic.run / "mirror").keep(synthetic.exports[name])
    synthetic.forget_receipts()
    verify_ledgers(synthetic.run)  # says itself that the folder's own word is all that there is
    with pytest.raises(LedgerError, match="not the one given with --key"):
        verify_ledgers(synthetic.run, key=[f"north={keys['north']}"])
    with pytest.raises(LedgerError, match="not pinned in the mirror given"):
        verify_ledgers(synthetic.run, mirror=genuine)
    with pytest.raises(LedgerError, match="there is no mirror of any ledger in 'empty'"):
        verify_ledgers(synthetic.run, mirror=synthetic.folder / "empty")


def test_hole_a_mirror_put_into_the_run_does_not_hide_the_one_in_the_state_folder(private: World) -> None:
    for name in HOSPITALS:
        private.forge(name, less_noise_claimed, STRANGER)
        LedgerMirror(private.run / "mirror").keep(private.exports[name])
    private.forget_receipts()
    with pytest.raises(LedgerError, match="not pinned in the mirror in the state folder"):
        verify_ledgers(private.run)


def test_hole_a_mirror_at_the_top_of_a_run_does_not_stand_in_for_its_exports(private: World) -> None:
    private.forge("north", less_noise_claimed, STRANGER)
    for path in private.mirror_folder.iterdir():
        shutil.copy2(path, private.run / path.name)
    assert (private.run / MIRROR_NAME).exists()
    with pytest.raises(LedgerError, match="not pinned"):
        verify_ledgers(private.run)


def test_a_private_account_may_have_gone_on_after_the_run(private: World) -> None:
    for name in HOSPITALS:
        ledger = private.ledger(name)
        ledger.settle(ledger.reserve("a later run", 1, 1, MECHANISM, None))
        LedgerMirror(private.mirror_folder).keep(ledger.export())
    both_pass(private)


def test_a_run_still_verifies_after_its_hospital_has_recovered_under_a_new_key(private: World) -> None:
    mirror = LedgerMirror(private.mirror_folder)
    shutil.rmtree(private.folder / "north")
    copy = mirror.export("north", "scans")
    assert copy is not None
    private.ledger("north")
    recover(private.folder / "north" / "ledger.sqlite", [copy], DELTA)
    export = private.ledger("north").export()
    mirror.accept_key("north", "scans", export["public_key"])
    mirror.keep(export)
    both_pass(private)
    private.write("ledger.json", {**private.exports, "north": export})  # the run was finished after the recovery
    both_pass(private)
    private.forge("north", less_noise_claimed, STRANGER)
    both_fail(private, "not pinned in the mirror in the state folder")


def test_hole_receipts_that_say_infinite_are_not_contradicted_by_an_export_without_the_mark(private: World) -> None:
    private.ledger("north").mark_unprotected("study", "privacy.enable_dp is off")
    private.train(3, "study")
    private.export()
    both_pass(private)
    private.forget_mirrors()
    private.forge("north", lambda events: [e for e in events if e.kind != "unprotected"], STRANGER)
    both_fail(private, "north")


def test_a_receipt_that_was_altered_fails_in_both(world: World) -> None:
    path = world.run / "receipts.jsonl"
    path.write_text(path.read_text().replace('"num_patients":40', '"num_patients":41').replace('"w1"', '"w9"'))
    for command in (verify_ledgers, verify_receipts_command):
        with pytest.raises(ReceiptError, match="changed after it was signed"):
            command(world.run)


def test_hole_an_altered_mirror_in_the_run_is_no_witness(synthetic: World) -> None:
    import sqlite3

    with sqlite3.connect(synthetic.mirror_folder / MIRROR_NAME) as raw:
        raw.execute("DELETE FROM events WHERE sequence > 4")
    both_fail(synthetic, "rows are missing at its end")


def test_verification_writes_nothing_into_a_run(world: World) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        paths = (path for path in world.run.rglob("*") if path.is_file() and "mirror.sqlite-" not in path.name)
        return {str(path): (path.stat().st_mode, path.read_bytes()) for path in paths}

    both_pass(world)
    before = state()
    both_pass(world)
    assert state() == before


WHY = "privacy.unit is hospital"


def charge_the_federation_alone(world: World, described: bool) -> None:
    """Turn a run into one of hospital-level privacy: its receipts name the federation, its hospitals are marked."""
    world.forget_mirrors()
    for name in ("north", "south"):
        shutil.rmtree(world.folder / name)
        world.ledger(name).mark_unprotected("study", WHY)
    (world.folder / "federation").mkdir(mode=0o700)
    central = PrivacyLedger.open(
        world.folder / "federation" / "ledger.sqlite", "federation", "study", DELTA, None, unit="hospital"
    )
    central.settle(central.reserve("study", 1, 1, MECHANISM.model_copy(update={"unit": "hospital"}), None))
    world.write_receipts([world.receipts[0].model_copy(update={"spent": {"federation": central.spent()}})], COORDINATOR)
    exports = {"federation": central.export(), **{name: world.ledger(name).export() for name in HOSPITALS}}
    world.write("ledger.json", exports)
    for export in exports.values():
        LedgerMirror(world.mirror_folder).keep(export)
    privacy = {"enable_dp": True, "noise_multiplier": 20.0, "unit": "hospital"}
    (world.run / "config.yaml").write_text(dump_yaml(small_run(privacy=privacy)))
    infos = json.loads((world.run / "hospitals.json").read_text())
    if described:
        infos["north"]["spent"] = infos["south"]["spent"] = world.ledger("north").spent().to_json()
        world.write("hospitals.json", infos)


@pytest.mark.parametrize("left", [("federation",), ("federation", "north")])
def test_hole_an_infinite_epsilon_taken_out_of_a_run_of_hospital_level_privacy_is_missed_by_the_mirror(
    private: World, left: tuple[str, ...]
) -> None:
    charge_the_federation_alone(private, described=False)
    both_pass(private)
    private.write("ledger.json", {name: private.exports[name] for name in left})
    both_fail(private, "is missing although the mirror in the state folder holds rows of this run")
    (private.run / "ledger.json").unlink()
    both_fail(private, "is missing although")


def test_hole_an_infinite_epsilon_taken_out_is_missed_by_the_runs_own_description(private: World) -> None:
    charge_the_federation_alone(private, described=True)
    private.forget_mirrors()
    private.write("ledger.json", {name: private.exports[name] for name in ("federation",)})
    both_fail(private, "'north' is missing although hospitals.json says what it had spent")
    infos = json.loads((private.run / "hospitals.json").read_text())
    infos["north"]["spent"] = None
    private.write("hospitals.json", infos)
    both_fail(private, "'north' is missing although its data are private and the run's hospitals keep ledgers")


def test_hole_the_export_of_another_data_set_does_not_stand_in_for_the_one_that_was_used(private: World) -> None:
    charge_the_federation_alone(private, described=True)
    other = PrivacyLedger.open(private.folder / "north" / "ledger.sqlite", "north", "phantoms", DELTA, None).export()
    LedgerMirror(private.mirror_folder).keep(other)
    private.write("ledger.json", {**private.exports, "north": other})
    both_fail(private, "'north' is of another data set than 'scans'")


def test_hole_without_receipts_the_runs_own_name_says_which_rows_are_its(private: World) -> None:
    charge_the_federation_alone(private, described=False)
    private.forget_receipts()
    (private.run / "job").write_text("study")
    private.write("ledger.json", {name: private.exports[name] for name in ("federation", "north")})
    with pytest.raises(LedgerError, match="'south' is missing although the mirror in the state folder holds rows"):
        verify_ledgers(private.run)


def test_a_run_of_an_earlier_version_whose_private_hospitals_kept_no_ledger_still_verifies(private: World) -> None:
    charge_the_federation_alone(private, described=False)
    federation = private.exports["federation"]
    private.forget_mirrors()
    LedgerMirror(private.mirror_folder).keep(federation)
    private.write("ledger.json", {"federation": federation, "north": {}, "south": {}})
    both_pass(private)
