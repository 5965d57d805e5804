"""A head as `ray start` makes it: who is refused, and the jobs of docs/howto/cluster.md, typed as they stand there."""

import json
import subprocess
import sys

import pytest
from howto_commands import commands
from ray_head import listeners, ray_head, wait_until, without_ray
from small_runs import small_run

from medfl_ray.config.files import dump_yaml

pytestmark = [pytest.mark.ci, pytest.mark.timeout(900)]

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
JOIN = "import ray; ray.init({address!r}, logging_level=50); print('CPUs:', ray.cluster_resources()['CPU'])"


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A head whose home holds the cluster's token where the how-to has it."""
    home = tmp_path_factory.mktemp("home")
    with ray_head(home) as started:
        secrets = home / "medfl" / "deploy" / "ray" / "secrets"
        secrets.mkdir(parents=True)
        (secrets / "auth_token").write_text(started.token)
        yield started


def write_run(folder, rounds=2, **privacy):
    """Write run.yaml into a new folder: the demo's kind of run, with three tiny hospitals."""
    folder.mkdir()
    run = small_run(
        name="demo",
        federation={"pool": "ray", "rounds": rounds},
        privacy=privacy or {"enable_dp": False},
        output={"report": False, "export": False, "register_model": False},
    )
    (folder / "run.yaml").write_text(dump_yaml(run))
    return folder


def typed(line, folder, **environment):
    """Run a line of the how-to as it stands."""
    return subprocess.run(
        ["bash", "-c", f"set -e\n{line}"],
        cwd=folder,
        env=without_ray(**environment),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def receipts_of(run_folder):
    return [json.loads(line) for line in (run_folder / "receipts.jsonl").read_text().splitlines()]


def test_everything_listens_on_loopback_metrics_and_client_port_included(head):
    found = listeners(head.process)
    assert {address for address, _ in found} <= LOOPBACK
    assert set(head.ports.values()) <= {port for _, port in found}


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["no token", "another token"])
def test_the_client_port_refuses_every_call_of_a_stranger(head, token):
    from ray.core.generated import ray_client_pb2

    services = ray_client_pb2.DESCRIPTOR.services_by_name.values()
    answers = {method.full_name: status_of(head, method, token) for of in services for method in of.methods}
    assert len(answers) >= 17
    assert set(answers.values()) == {"UNAUTHENTICATED"}, answers
    ping = ray_client_pb2.ClusterInfoRequest(type=ray_client_pb2.ClusterInfoType.PING).SerializeToString()
    info = ray_client_pb2.DESCRIPTOR.services_by_name["RayletDriver"].methods_by_name["ClusterInfo"]
    assert [status_of(head, info, who, ping) for who in (token, head.token)] == ["UNAUTHENTICATED", "OK"]


def test_a_stranger_does_not_join_by_the_client_port(head):
    refused = join_by_client_port(head)
    assert refused.returncode != 0
    assert "CPUs:" not in refused.stdout
    assert "ConnectionError" in refused.stderr, refused.stderr[-2000:]
    assert head.token not in refused.stderr


def test_the_client_port_lets_in_who_has_the_token(head):
    joined = join_by_client_port(head, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=head.token)
    assert joined.stdout.strip() == "CPUs: 2.0", joined.stderr[-2000:]


def status_of(head, method, token, message=b""):
    """Call a method of the client port and return the status of its answer."""
    import grpc

    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    path = f"/{method.containing_service.full_name}/{method.name}"
    with grpc.insecure_channel(head.client.removeprefix("ray://")) as channel:
        try:
            if method.client_streaming:
                list(channel.stream_stream(path)(iter([]), metadata=metadata, timeout=60))
            elif method.server_streaming:
                list(channel.unary_stream(path)(message, metadata=metadata, timeout=60))
            else:
                channel.unary_unary(path)(message, metadata=metadata, timeout=60)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


def join_by_client_port(head, **environment):
    script = JOIN.format(address=head.client)
    return subprocess.run(
        [sys.executable, "-c", script],
        env=without_ray(HOME=str(head.home), **environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_without_the_token_no_job_is_taken(head, tmp_path):
    line = f"ray job submit --address {head.dashboard} -- touch {tmp_path}/was-here"
    for stranger in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        refused = typed(line, tmp_path, HOME=str(tmp_path), **stranger)
        assert refused.returncode != 0
        assert head.token not in refused.stdout + refused.stderr
    assert not (tmp_path / "was-here").exists()


@pytest.mark.long
def test_the_howtos_commands_for_jobs_run_stop_and_resume(head, tmp_path):
    clean = write_run(tmp_path / "clean", enable_dp=True, epsilon=60, max_grad_norm=1.0, sample_rate=0.5)
    export, submit, logs, status, again, stop, resume = commands("job")
    runs = head.home / "medfl" / "runs"

    def at_head(line):
        line = line.replace("http://127.0.0.1:8265", head.dashboard)
        return typed(f"{export}\n{line}", clean, HOME=str(head.home))

    first = at_head(submit)
    assert "all 2 rounds were published." in first.stdout, first.stdout[-3000:] + first.stderr[-2000:]
    assert "round 2/2" in at_head(logs).stdout
    said = at_head(status)
    assert "'first' succeeded" in said.stdout + said.stderr
    (finished,) = runs.iterdir()
    assert [receipt["round"] for receipt in receipts_of(finished)] == [1, 2]

    assert at_head(again).returncode == 0
    wait_until(lambda: "round 1/6" in at_head(logs.replace("first", "second")).stdout)
    assert at_head(stop).returncode == 0
    said = at_head(status.replace("first", "second"))
    assert "'second' was stopped" in said.stdout + said.stderr
    (stopped,) = set(runs.iterdir()) - {finished}
    published = [receipt for receipt in receipts_of(stopped) if receipt["published"]]
    assert 1 <= len(published) < 6

    third = at_head(resume.replace("<folder>", stopped.name))
    assert "all 6 rounds were published." in third.stdout, third.stdout[-3000:] + third.stderr[-2000:]
    whole = [receipt for receipt in receipts_of(stopped) if receipt["published"]]
    assert [receipt["round"] for receipt in whole] == [1, 2, 3, 4, 5, 6]
    assert whole[: len(published)] == published
    assert sorted(path.name for path in clean.iterdir()) == ["run.yaml"]


@pytest.mark.long
def test_the_howtos_commands_for_the_laptop_give_the_same_weights(tmp_path):
    folder = write_run(tmp_path / "work")
    lines = commands("laptop")
    assert len(lines) == 2
    for line in lines:
        done = typed(line, folder, HOME=str(tmp_path))
        assert "all 2 rounds were published." in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    one, other = (receipts_of(run)[-1]["weights_after"] for run in sorted(folder.glob("runs/*")))
    assert one == other
