"""How a hospital starts: broken private data are found before round 1, and what is said holds no identifier."""

import dataclasses

import pytest
import structlog
from cli_runs import DP, assert_one_clear_error, configuration, hospital_data, run_folders, write_config, write_patients

from medfl_ray.assembly.hospital import build_hospital, configure_logs
from medfl_ray.assembly.spec import HospitalSpec
from medfl_ray.config.files import parse_run_config
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ConfigError, DataError, LedgerError, PrivacyConfigError, StorageError, UnreadableFile
from medfl_ray.federation.hospital import Hospital
from medfl_ray.federation.planning import mechanism_for
from medfl_ray.messages import RoundPlan
from medfl_ray.store import signing_key
from medfl_ray.store.run.folder import RunFolder


def spec_of(tmp_path, privacy=DP, cache="memory", **changes):
    data = {**hospital_data(tmp_path / "patients", max_epsilon=50.0, **changes), "cache": cache}
    # A fixed group size: a measured one differs from start to start on a busy machine, whatever the data.
    run = parse_run_config(configuration(data=data, privacy=privacy, training={"patient_group_size": 2}))
    (policy,) = list_hospitals(run)
    return HospitalSpec(run, policy, 0, (policy.hospital,), tmp_path / "state")


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_broken_private_case_is_found_at_the_start_and_not_named(tmp_path, capsys, cache):
    folder = write_patients(tmp_path / "patients")
    before = build_hospital(spec_of(tmp_path, cache=cache)).info()
    (folder / "2.nii.gz").write_bytes(b"junk")
    hospital = build_hospital(spec_of(tmp_path, cache=cache))
    assert hospital.info() == before, "nothing that leaves shows it"
    data = hospital._parts.data
    assert data.num_train_patients + len(data.holdout) == 3
    assert "case 3 of 4" in capsys.readouterr().out  # the hospital's own log
    for name in "013":
        (folder / f"{name}.nii.gz").write_bytes(b"junk")
    with pytest.raises(DataError) as caught:
        build_hospital(spec_of(tmp_path, cache=cache))
    assert "stands in the hospital's own log" in str(caught.value)
    assert not any(character.isdigit() for character in str(caught.value))
    assert "not one patient" in capsys.readouterr().out


def test_public_data_are_read_when_needed_and_named(tmp_path):
    folder = write_patients(tmp_path / "patients")
    (folder / "2.nii.gz").write_bytes(b"junk")
    hospital = build_hospital(spec_of(tmp_path, declared="public"))
    with pytest.raises(UnreadableFile, match="case 3 of 4"):
        hospital._parts.data.check_cases()


def test_a_traceback_shows_no_local_variables(capsys):
    configure_logs()

    def fails(patient_name):
        raise ValueError("broken")

    try:
        fails("Mrs-Ada")
    except ValueError:
        structlog.get_logger().exception("hospital_failed")
    said = capsys.readouterr().out
    assert "ValueError: broken" in said
    assert "in fails" in said
    assert "Mrs-Ada" not in said.replace('fails("Mrs-Ada")', "")


def test_a_release_that_fails_leaves_the_charge_and_raises_nothing(tmp_path, monkeypatch, capsys):
    write_patients(tmp_path / "patients")
    hospital = build_hospital(spec_of(tmp_path))
    parts = hospital._parts
    mechanism = mechanism_for(parts.run, parts.policy)
    plan = RoundPlan(
        job="job",
        round=1,
        attempt=1,
        config_hash="",
        weights_checksum="",
        hospitals=("north",),
        num_steps={"north": mechanism.num_steps},
        learning_rate=0.01,
        mechanisms={"north": mechanism},
    )
    spent = hospital.reserve(plan)

    def refuse(reservation, reason):
        raise LedgerError("the disk is full")

    monkeypatch.setattr(parts.ledger, "release", refuse)
    assert hospital.release(plan, "called off") is None
    assert hospital.info().spent.epsilon == spent.epsilon
    assert "the disk is full" in capsys.readouterr().out
    assert Hospital(dataclasses.replace(parts, ledger=None)).release(plan, "nothing was reserved") is None


def test_a_fault_of_the_configuration_that_only_the_hospital_can_see_exits_with_2(medfl, tmp_path):
    write_patients(tmp_path / "patients")
    raw = configuration(data=hospital_data(tmp_path / "patients"), training={"device": "cuda:99"})
    answer = medfl("run", write_config(tmp_path / "run.yaml", raw))
    assert_one_clear_error(answer, 2, "north", "training.device is 'cuda:99'")
    assert run_folders() == []


def test_two_processes_do_not_run_one_folder(medfl, tmp_path):
    run = parse_run_config(configuration(output={"directory": str(tmp_path / "runs")}))
    folder = RunFolder.create(run)
    with folder.locked():
        with pytest.raises(StorageError, match="another process is running"), RunFolder.open(folder.path).locked():
            pass
        answer = medfl("run", "--resume", folder.path)
        assert_one_clear_error(answer, 1, "another process is running", folder.path.name)
    assert medfl("run", "--resume", folder.path).code == 0


def test_a_new_key_is_in_its_folder_after_a_power_cut(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        signing_key, "sync_folder", lambda folder: synced.append([path.name for path in folder.iterdir()])
    )
    signing_key.create_key(tmp_path / "hospital.key")
    assert synced == [["hospital.key"]]


def site_file(tmp_path, epsilon):
    path = tmp_path / "hospital_config.yaml"
    path.write_text(
        "hospital: {id: north}\n"
        f"data: {{directory: {tmp_path / 'patients'}, labels: {{1: lesion}}}}\n"
        f"privacy: {{epsilon: {epsilon}, num_patients: 4}}\n"
    )
    return path


def test_the_hospitals_own_file_wins_where_it_is_read(tmp_path):
    write_patients(tmp_path / "patients")
    path = site_file(tmp_path, 50)
    data = {"hospitals": [{"id": "north", "site_config": str(path)}], "spacing_mm": [1], "channels": ["T1"]}
    run = parse_run_config(configuration(data=data, privacy=DP))
    (policy,) = list_hospitals(run)
    spec = HospitalSpec(run, policy, 0, (policy.hospital,), tmp_path / "state")
    assert build_hospital(spec).id == "north"
    site_file(tmp_path, 1)
    with pytest.raises(PrivacyConfigError, match="another policy in its own file"):
        build_hospital(spec)
    elsewhere = run.model_copy(update={"output": run.output.model_copy(update={"state_directory": tmp_path / "new"})})
    with pytest.raises(ConfigError, match="where its ledger lies is not for a run to say"):
        list_hospitals(elsewhere)
