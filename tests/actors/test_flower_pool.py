"""Our run over Flower's messages gives the weights of one process, bit for bit, and hospitals keep what they must."""

import json
import threading
from pathlib import Path

import pytest
import yaml
from flwr.app import Error, Message, RecordDict
from loop_grid import LoopGrid
from private_hospitals import private_run, write_patients
from small_runs import small_run

from actors.flower import hospital as flower_hospital
from actors.flower.app import GridLink
from actors.flower.hospital import answer, hospital_of, node_of
from actors.flower.messages import HospitalRequest, pack, text_of, unpack
from actors.flower.pool import FlowerPool
from actors.flower.rule import with_flower
from actors.flower.run import run_over_flower
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.config.files import load_run_config
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ConfigError, FederationError, QuorumLost
from medfl_ray.messages import ClientFailure, HospitalInfo, Metric, SiteEvaluation
from medfl_ray.store.run.folder import RunFolder

PRIVATE = {"enable_dp": True, "noise_multiplier": 1.0, "sample_rate": 0.5, "max_grad_norm": 0.5, "delta": 1e-5}


@pytest.fixture(autouse=True)
def identity(tmp_path, monkeypatch):
    from actors.flower.aggregation import identify

    identify()
    monkeypatch.setenv("MEDFL_STATE_DIR", str(tmp_path / "state"))
    flower_hospital.hospital_of.cache_clear()
    yield
    flower_hospital.hospital_of.cache_clear()


def two(tmp_path, **sections):
    phantom = {"num_hospitals": 2, "patients_per_hospital": 4, "size_voxels": 16, "seed": 3}
    output = {"directory": tmp_path / "runs", "report": False, "export": False}
    return small_run(data={"phantom": phantom}, output=output, **sections)


def file_of(run, tmp_path, name="run.yaml"):
    file = tmp_path / name
    file.write_text(yaml.safe_dump(run.model_dump(mode="json", exclude_defaults=True)))
    return file


def alone(run, events=None):
    policies, folder = tuple(list_hospitals(run)), RunFolder.create(run)
    pool = local_pool(hospital_specs(run, policies, folder.path))
    return run_in_process(
        run, policies, folder.path, pool, lambda event: None, threading.Event(), with_flower(run, print)
    )


def newest(run):
    return RunFolder.open(max(Path(run.output.directory).iterdir()))


@pytest.mark.parametrize("strategy", ["fedavg", pytest.param("flower", marks=pytest.mark.ci)])
def test_the_same_file_gives_the_same_weights_as_in_one_process(tmp_path, strategy):
    aggregation = {"strategy": strategy, "flower": {"strategy": "FedYogi", "options": {"eta": 0.01}}}
    run = two(tmp_path, aggregation=aggregation)
    expected = alone(run)
    app = {"run": str(file_of(run, tmp_path))}
    grid = LoopGrid({11: {"partition-id": 1}, 10: {"partition-id": 0}}, app)
    outcome = run_over_flower(GridLink(grid), app)
    assert outcome.completed
    assert outcome.weights_checksum == expected.weights_checksum
    receipts = newest(run).signed_receipts()
    assert [len(receipt.trained) for receipt in receipts] == [2, 2]
    assert {message.metadata.message_type for message in grid.sent} == {"query", "train", "evaluate"}


def test_a_run_is_resumed_where_it_stopped_with_the_strategys_memory_and_the_hospitals_keys(tmp_path):
    flower = {"strategy": "FedAvgM", "options": {"server_momentum": 0.9}}
    run = two(tmp_path, aggregation={"strategy": "flower", "flower": flower}, federation={"rounds": 2})
    app, stop = {"run": str(file_of(run, tmp_path))}, threading.Event()
    nodes = {1: {"partition-id": 0}, 2: {"partition-id": 1}}
    expected = alone(run)
    policies, folder = tuple(list_hospitals(run)), RunFolder.create(run)
    pool = FlowerPool(GridLink(LoopGrid(nodes, app)), run, policies, folder.job, {}, 10)
    extras = with_flower(run, print)
    first = run_in_process(run, policies, folder.path, pool, lambda e: e.type == "round" and stop.set(), stop, extras)
    assert (first.rounds_done, first.completed) == (1, False)
    outcome = run_over_flower(GridLink(LoopGrid(nodes, app, forgets=True)), {"resume": str(folder.path)})
    assert outcome.completed
    assert outcome.weights_checksum == expected.weights_checksum


def test_a_private_round_is_charged_once_though_every_message_has_a_process_of_its_own(tmp_path):
    run = two(tmp_path, privacy=PRIVATE, federation={"rounds": 1, "local_steps": 2})
    file = str(file_of(run, tmp_path))
    names = [policy.hospital for policy in list_hospitals(run)]
    nodes = {number: {"hospital": name, "run": file} for number, name in enumerate(names, start=1)}
    outcome = run_over_flower(GridLink(LoopGrid(nodes, {}, forgets=True)), {"run": file})
    assert outcome.completed
    receipt = newest(run).results()[0].receipt
    assert set(receipt.trained) == set(names)
    assert all((s.unit, s.adjacency, s.delta) == ("patient", "add_remove", 1e-5) for s in receipt.spent.values())
    expected = alone(run)
    assert expected.completed
    assert {n: s.epsilon for n, s in newest(run).results()[0].receipt.spent.items()} == {
        n: s.epsilon for n, s in receipt.spent.items()
    }
    kept = list((tmp_path / "state").rglob("flower_reservations.json"))
    assert len(kept) == 2
    assert all(json.loads(file.read_text()) == [] for file in kept)


def test_a_node_with_another_run_file_and_two_that_claim_one_hospital_take_no_part(tmp_path):
    run = two(tmp_path, federation={"rounds": 1, "min_clients": 2})
    file, other = file_of(run, tmp_path), file_of(two(tmp_path, federation={"rounds": 9}), tmp_path, "other.yaml")
    first, second = (policy.hospital for policy in list_hospitals(run))
    nodes = {1: {"hospital": first, "run": str(other)}, 2: {"hospital": second, "run": str(file)}}
    with pytest.raises(ConfigError, match="not the coordinator's"):
        run_over_flower(GridLink(LoopGrid(nodes, {})), {"run": str(file), "wait-s": 2})
    nodes = {number: {"hospital": first, "run": str(file)} for number in (1, 2)}
    with pytest.raises(QuorumLost, match=r"several SuperNodes.*no SuperNode said within 1 s"):
        run_over_flower(GridLink(LoopGrid(nodes, {})), {"run": str(file), "wait-s": 1})


def test_what_cannot_be_done_over_flower_is_refused(tmp_path):
    for sections, said in (
        ({"federation": {"baselines": ["central"]}}, "pools all data"),
        ({"federation": {"stragglers": "keep", "deadline_s": 60}}, "after the deadline"),
    ):
        file = file_of(two(tmp_path, **sections), tmp_path)
        with pytest.raises(ConfigError, match=said):
            run_over_flower(GridLink(LoopGrid({}, {})), {"run": str(file)})
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match="names no run"):
        run_over_flower(GridLink(LoopGrid({}, {})), {})


def test_a_node_says_what_its_configuration_lacks(tmp_path):
    with pytest.raises(ConfigError, match="names its hospital but no run file"):
        node_of({"hospital": "a"}, {"run": "/of/the/coordinator.yaml"})
    with pytest.raises(ConfigError, match="does not say which hospital"):
        node_of({}, {"run": "x"})
    file = str(file_of(two(tmp_path), tmp_path))
    with pytest.raises(ConfigError, match=r"more nodes than the run has hospitals \(2\)"):
        node_of({"partition-id": 2}, {"run": file})


def test_private_data_are_trained_on_only_where_the_node_itself_names_the_run(tmp_path):
    run = two(tmp_path)
    raw = run.model_dump(mode="json", exclude_defaults=True)
    hospital = {"id": "north", "num_patients": 5, "directory": str(tmp_path)}
    file = tmp_path / "private.yaml"
    file.write_text(yaml.safe_dump({**raw, "data": {"hospitals": [hospital], "declared": "private"}}))
    config_hash = load_run_config(file).config_hash
    request = text_of(HospitalRequest(ask="describe", hospital="north", job="j", config_hash=config_hash))
    found = answer(request, None, {"partition-id": 0}, {"run": str(file)})
    assert "does not say itself what it trains" in found.reason
    found = answer(request, None, {"hospital": "north", "run": str(file)}, {})
    assert "does not say itself" not in found.reason  # it goes on to the data, which are not there


def test_hole_a_run_file_over_private_data_is_carried_out_as_often_as_the_hospital_says(tmp_path):
    run = private_run(tmp_path / "images", output={"state_directory": str(tmp_path / "state")})
    write_patients(tmp_path / "images", 12)
    file = file_of(run, tmp_path)
    config_hash = load_run_config(file).config_hash

    def described(job, **node):
        request = text_of(HospitalRequest(ask="describe", hospital="a", job=job, config_hash=config_hash))
        hospital_of.cache_clear()  # a process of its own for every message
        return answer(request, None, {"hospital": "a", "run": str(file), **node}, {})

    assert isinstance(described("first"), HospitalInfo)
    assert isinstance(described("first"), HospitalInfo)
    assert hospital_of.cache_info().currsize == 1
    refused = described("second")
    assert "was carried out already, as first" in refused.reason
    assert "executions=2" in refused.reason
    assert isinstance(described("second", executions=2), HospitalInfo)
    assert isinstance(described("third", executions=2), ClientFailure)
    assert "whole number from 1" in described("third", executions="many").reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hospital": "elsewhere"}, "is for 'elsewhere'"),
        ({"config_hash": "0"}, "not the coordinator's"),
        ({"job": "../../etc"}, "no plain file name"),
        ({"ask": "train"}, "lacks its plan or its weights"),
    ],
)
def test_a_request_for_something_else_is_a_failure_with_the_reason(tmp_path, changes, said):
    run = two(tmp_path)
    node = {"hospital": list_hospitals(run)[0].hospital, "run": str(file_of(run, tmp_path))}
    fields = {"ask": "describe", "hospital": node["hospital"], "job": "job", "config_hash": run.config_hash}
    found = answer(text_of(HospitalRequest(**{**fields, **changes})), None, node, {})
    assert isinstance(found, ClientFailure)
    assert said in found.reason


def test_answers_travel_unchanged_and_rubbish_is_refused():
    values = {"dice": Metric(value=float("nan"), label="public"), "loss": Metric(value=None, label="suppressed")}
    sent = SiteEvaluation(hospital="a", round=1, metrics=values, patient_scores=(0.5,), pictures=(b"\x89PNG\xff",))
    found = unpack(pack(sent))
    assert found.pictures == sent.pictures
    assert found.patient_scores == (0.5,)
    assert found.metrics["dice"].value != found.metrics["dice"].value
    assert found.metrics["loss"].value is None
    assert unpack(pack(None)) is None
    assert unpack(pack({"events": []})) == {"events": []}
    parcel = pack(sent)
    for kind, body in (("SiteEvaluation", "{"), ("SiteEvaluation", "{}"), ("Elsewhere", "{}"), ("ClientUpdate", "{}")):
        with pytest.raises(FederationError):
            unpack(type(parcel)(kind, body))


class BrokenGrid(LoopGrid):
    """Nodes that Flower cannot reach once the hospitals are known, or that answer with other records."""

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        for reply, sent in [(r, s) for r in replies for s in self.sent]:
            if sent.metadata.message_id != reply.metadata.reply_to_message_id:
                continue
            if sent.metadata.message_type == "train":
                first = sent.metadata.dst_node_id == 1
                yield (
                    Message(Error(8, "Patient Miller"), reply_to=sent)
                    if first
                    else Message(RecordDict(), reply_to=sent)
                )
            else:
                yield reply


def test_a_node_that_fails_is_named_and_its_own_words_stay_with_it(tmp_path):
    run = two(tmp_path, federation={"rounds": 1})
    app = {"run": str(file_of(run, tmp_path))}
    with pytest.raises(QuorumLost):
        run_over_flower(GridLink(BrokenGrid({1: {"partition-id": 0}, 2: {"partition-id": 1}}, app)), app)
    failures = newest(run).results()[0].receipt.failures
    said = {failure.hospital: failure.reason for failure in failures}
    assert len(said) == 2
    assert any("its error 8" in reason for reason in said.values())
    assert any("other records than ours" in reason for reason in said.values())
    assert "Miller" not in str(said)


def test_the_hospital_says_what_is_public_of_it(tmp_path):
    run = two(tmp_path)
    app = {"run": str(file_of(run, tmp_path))}
    request = HospitalRequest(
        ask="describe", hospital=list_hospitals(run)[0].hospital, job="j", config_hash=run.config_hash
    )
    found = [answer(text_of(request), None, {"partition-id": 0}, app) for _ in range(2)]
    flower_hospital.hospital_of.cache_clear()
    found.append(answer(text_of(request), None, {"partition-id": 0}, app))
    assert all(isinstance(info, HospitalInfo) for info in found)
    assert len({info.public_key for info in found}) == 1
