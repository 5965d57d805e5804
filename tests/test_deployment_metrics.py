"""What deploy/ gives Prometheus and Grafana, held against the scrape of a run, a simulation and a served model."""

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from scraping import metrics_address, scrape_until
from small_runs import Interfering, balls, small_run

from actors.cluster_metrics import COUNTERS, GAUGES, HISTOGRAMS, ClusterMetrics
from actors.ray_pool import RayPool
from actors.simulation.run import Simulation
from medfl_ray.assembly.run import hospital_specs, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.messages import ClientFailure
from medfl_ray.store.run.folder import RunFolder
from serve.replicas.model_loader import ModelKey
from serve.replicas.replica import WorkReport
from serve.serving_metrics import ServingMetrics

ROOT = Path(__file__).parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "medfl-ray.json").read_text())
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
NAME = re.compile(r"\bray_\w+")
NAMES = {name for text in (*QUERIES, *(rule["expr"] for rule in RULES)) for name in NAME.findall(text)}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus"
)
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Prometheus is not installed: apt-get install prometheus"
)


def folder_of(run, directory):
    return RunFolder.create(run.model_copy(update={"output": run.output.model_copy(update={"directory": directory})}))


def without_the_first_attempt(update):
    """Lose every update of the first attempt, so that there are failures and a round without quorum."""
    if update.attempt > 1:
        return [update]
    reason = "lost by the test"
    return [ClientFailure(hospital=update.hospital, round=1, attempt=1, stage="train", reason=reason)]


@pytest.fixture(scope="module")
def live(ray_cluster, tmp_path_factory):
    """A run on Ray, a simulation and a served model, whose figures are on the metrics page until the tests end."""
    run = small_run(
        privacy={"enable_dp": True, "epsilon": 99.0, "noise_multiplier": 2.0, "max_grad_norm": 1.0, "sample_rate": 0.5},
    )
    policies = tuple(policy.model_copy(update={"max_epsilon": 99.0}) for policy in list_hospitals(run))
    folder = folder_of(run, tmp_path_factory.mktemp("run"))
    simulated = balls(federation={"rounds": 1, "num_actors": 1})
    virtual, other = tuple(list_hospitals(simulated)), folder_of(simulated, tmp_path_factory.mktemp("simulation"))
    served = ServingMetrics(drift_threshold=1.0, drift_smoothing=1.0, ray_too=True)
    ended = threading.Event()

    def requests():
        while not ended.wait(0.3):
            served.started()
            served.worked(ModelKey("lungs", "1"), WorkReport(0.1, (4,), (2.0,)), 0.2)
            served.ended("infer", 200, 0.2)

    with ExitStack() as stack:
        metrics = stack.enter_context(ClusterMetrics(run, folder.job, policies, repeat_s=0.2))
        pool = Interfering(
            RayPool(hospital_specs(run, policies, folder.path), folder.job, 1), without_the_first_attempt
        )
        assert run_in_process(run, policies, folder.path, pool, metrics.update, threading.Event()).completed
        again = stack.enter_context(ClusterMetrics(simulated, other.job, virtual, repeat_s=0.2))
        with Simulation(simulated, virtual, other.path, again.update) as simulation:
            assert simulation.run().completed
        client = threading.Thread(target=requests)
        client.start()
        stack.callback(lambda: (ended.set(), client.join()))
        yield


@pytest.mark.ci
def test_every_name_in_dashboard_and_rules_is_in_a_scrape_of_a_live_run(live):
    assert len(NAMES) > 20
    scrape_until(lambda samples: {sample.name for sample in samples} >= NAMES)


def test_every_figure_of_a_run_is_shown_or_alerted_on():
    exported = {f"ray_{name}" for name in (*GAUGES, *COUNTERS, *HISTOGRAMS)}
    shown = {re.sub(r"_(total|bucket|sum)$", "", name) for name in NAMES}
    assert {name for name in shown - exported if not name.startswith("ray_medfl_serve_")} == set()
    assert exported - shown == {"ray_medfl_auc", "ray_medfl_accuracy"}  # of classifiers, as Dice is of segmenters


def test_the_dashboard_is_one_that_grafana_can_load():
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= set(DASHBOARD)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (column, line)
            for column in range(place["x"], place["x"] + place["w"])
            for line in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = {name for text in (*QUERIES, json.dumps(PANELS)) for name in re.findall(r"\$\{?(\w+)", text)}
    assert {name for name in used if not name.startswith("__")} == variables
    assert all(panel["title"] and panel["datasource"]["uid"] == "${datasource}" for panel in PANELS)


def test_the_provisioning_names_a_loopback_server_and_the_dashboards_own_folder():
    folder = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "medfl-ray.yml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
    (provider,) = yaml.safe_load((folder / "dashboards" / "medfl-ray.yml").read_text())["providers"]
    assert provider["type"] == "file"
    assert provider["options"]["path"].endswith("dashboards/medfl-ray")


def test_epsilons_are_shown_with_unit_delta_and_adjacency():
    for text in (*QUERIES, *(rule["expr"] for rule in RULES)):
        if "epsilon" in text:
            assert all(label in text for label in ("unit", "delta", "adjacency")), text
    assert set(GAUGES["medfl_epsilon_spent"][1]) == {"run", "hospital", "unit", "delta", "adjacency"}


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")],
    ids=" ".join,
)
def test_promtool_accepts_configuration_and_rules(arguments):
    done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_among_promtools():
    cases = (PROMETHEUS / "rules_test.yml").read_text()
    assert not [rule["alert"] for rule in RULES if rule["alert"] not in cases]


@pytest.fixture
def prometheus(live, tmp_path):
    """Debian's Prometheus with our configuration, on the tests' cluster; yields its address."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    found = tmp_path / "found.json"
    found.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [metrics_address()]}]))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str(found)]
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    log = (tmp_path / "log").open("w")
    command = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    running = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    yield f"http://127.0.0.1:{port}"
    running.terminate()
    running.wait(timeout=30)
    log.close()


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(address, path):
    """Return the data of an answer of Prometheus's API, or None while it starts."""
    try:
        with urllib.request.urlopen(f"{address}/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]
    except ConnectionError:
        return None
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return None
        raise
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionError):
            return None
        raise


@needs_prometheus
@pytest.mark.ci
def test_prometheus_scrapes_a_run_answers_every_panel_and_fires_the_alerts_that_it_should(prometheus):
    texts = {query.replace("$run", ".*").replace("$__rate_interval", "5s") for query in QUERIES}
    expected = {"MedflRoundNotPublished"}
    ends = time.monotonic() + 60
    while time.monotonic() < ends and (texts or expected):
        for text in list(texts):
            data = ask(prometheus, "query?" + urllib.parse.urlencode({"query": text}))
            if data is not None and data["result"]:
                texts.discard(text)
        alerts = ask(prometheus, "alerts") or {"alerts": []}
        expected -= {alert["labels"]["alertname"] for alert in alerts["alerts"] if alert["state"] == "firing"}
        time.sleep(0.5)
    assert not texts
    assert not expected
    loaded = ask(prometheus, "rules")
    names = {rule["name"]: rule["health"] for group in loaded["groups"] for rule in group["rules"]}
    assert names == {rule["alert"]: "ok" for rule in RULES}
