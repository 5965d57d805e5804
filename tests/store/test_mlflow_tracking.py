"""A run's copy in a real MLflow store: parameters, labelled figures, files, and the alias of the registered model."""

import shutil
import sqlite3

import pytest
from cli_runs import DP, assert_one_clear_error, command_line, configuration, run_folders, write_config, write_patients
from small_runs import small_run

from medfl_ray.config.files import parse_run_config
from medfl_ray.errors import ConfigError
from medfl_ray.round_times import GRID_S
from medfl_ray.store.run.mlflow_tracking import MlflowRun, open_client

mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'medfl-ray[mlflow]'")


@pytest.fixture
def medfl(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDFL_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return command_line(monkeypatch, capsys)


def the_run(uri):
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    (experiment,) = (found for found in client.search_experiments() if found.name != "Default")
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A store with its tables, which take seconds to make."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    open_client(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.ci
def test_a_run_is_copied_and_its_champion_follows_a_promotion(medfl, uri, tmp_path):
    output = {"export": True, "report": True, "mlflow": {"tracking_uri": uri}}
    privacy = {**DP, "epsilon": 50.0, "noise_multiplier": 2.0}
    raw = configuration(output=output, privacy=privacy, federation={"rounds": 2, "local_steps": 2})
    answer = medfl("run", write_config(tmp_path / "run.yaml", raw))
    assert answer.code == 0, answer
    assert "WARNING" not in answer.out
    (folder,) = run_folders()
    client, found = the_run(uri)
    params, tags = found.data.params, found.data.tags
    assert (params["federation.rounds"], params["privacy.noise_multiplier"]) == ("2", "2.0")
    assert str(tmp_path) not in str(params)
    hospitals = {key.partition("/")[0] for key in found.data.metrics}
    assert len(hospitals) == 2
    for hospital in hospitals:
        assert [point.step for point in client.get_metric_history(found.info.run_id, f"{hospital}/dice")] == [1, 2]
        assert found.data.metrics[f"{hospital}/epsilon"] > 0
        assert tags[f"epsilon.{hospital}"].startswith("patient-level, delta=")
        assert "adjacency add_remove" in tags[f"epsilon.{hospital}"]
    artifacts = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert artifacts == {"report.html", "model.onnx", "receipts.jsonl", "ledger.json"}
    assert found.info.status == "FINISHED"
    assert client.get_model_version_by_alias("tiny", "candidate").run_id == found.info.run_id

    assert medfl("models", "promote", "tiny", "--override", "a test").code == 0
    answer = medfl("models", "mirror", "tiny", uri)
    assert answer.out.strip() == "champion is version 1"
    assert {alias: int(version) for alias, version in client.get_registered_model("tiny").aliases.items()} == {
        "champion": 1
    }

    assert medfl("run", "--resume", folder).code == 0
    _, again = the_run(uri)
    assert again.info.run_id == found.info.run_id


@pytest.mark.parametrize("enable_dp", [True, False], ids=["suppressed", "unprotected"])
def test_no_figure_of_private_data_is_copied(medfl, uri, tmp_path, enable_dp):
    budget = {"max_epsilon": 60.0} if enable_dp else {}
    data = {
        "hospitals": [{"id": "north", "directory": str(write_patients(tmp_path / "p")), "num_patients": 20, **budget}],
        "labels": {1: "box"},
        "channels": ["T1"],
        "holdout_fraction": 0.5,
    }
    privacy = {**DP, "epsilon": None, "noise_multiplier": 2.0} if enable_dp else {"enable_dp": False}
    raw = configuration(data=data, privacy=privacy, output={"mlflow": {"tracking_uri": uri}})
    assert medfl("run", write_config(tmp_path / "run.yaml", raw)).code == 0
    _, found = the_run(uri)
    epsilons = {"north/epsilon", "north/epsilon_run", "north/epsilon_extra"}
    assert set(found.data.metrics) == (epsilons if enable_dp else set())
    assert ("infinite (unprotected)" in found.data.tags["epsilon.north"]) is not enable_dp


@pytest.mark.ci
def test_a_store_that_does_not_answer_stops_a_run_before_it_starts(medfl, tmp_path):
    output = {"mlflow": {"tracking_uri": "http://127.0.0.1:9"}}
    answer = medfl("run", write_config(tmp_path / "run.yaml", configuration(output=output)))
    assert_one_clear_error(answer, 2, "MLflow's store did not answer", "output.mlflow.tracking_uri")


@pytest.mark.ci
def test_a_store_that_is_lost_on_the_way_is_named_and_the_run_ends_well(medfl, uri, tmp_path, monkeypatch):
    from medfl_ray.store.run.mlflow_tracking import MlflowRun

    add_round = MlflowRun.add_round

    def losing(self, result):
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            database.execute("ALTER TABLE metrics RENAME TO gone")
        add_round(self, result)

    monkeypatch.setattr(MlflowRun, "add_round", losing)
    answer = medfl("run", write_config(tmp_path / "run.yaml", configuration(output={"mlflow": {"tracking_uri": uri}})))
    assert answer.code == 0, answer
    assert "its copy of the run is incomplete" in answer.out


@pytest.mark.parametrize("place", ["mlruns", "file:///x", "http://mlflow.example", "https://me:secret@mlflow.example"])
def test_a_store_without_transport_security_or_with_a_password_is_refused(place):
    with pytest.raises(ConfigError, match=r"output\.mlflow\.tracking_uri") as caught:
        parse_run_config(configuration(output={"mlflow": {"tracking_uri": place}}))
    assert "secret" not in str(caught.value).replace("MLFLOW", "")


@pytest.mark.parametrize(("fraction", "on_the_hour"), [(0.5, True), (1.0, False)])
def test_hole_a_run_with_secret_cohorts_ends_at_a_full_hour(uri, tmp_path, fraction, on_the_hour):
    """MLflow shows a run's length, which is the sum of what all its cohorts took."""
    run = small_run(
        output={"mlflow": {"tracking_uri": uri}},
        privacy={"enable_dp": True, "unit": "hospital", "noise_multiplier": 2.0},
        federation={"fraction": fraction},
    )
    copy = MlflowRun(run, "20260101-000000-small")
    copy.finish(tmp_path, True, None)
    assert copy.problem is None
    _, found = the_run(uri)
    assert (found.info.end_time % (1000 * GRID_S) == 0) is on_the_hour
