"""The Kubernetes files have fields that KubeRay and Kubernetes know, and name what the project and each other have."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
FIELDS = json.loads((Path(__file__).parent / "kuberay_fields.json").read_text())
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def strict(required, **properties):
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


TEXT, LABELS = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}
SELECTOR = strict([], matchLabels=LABELS)
PEERS = {"type": "array", "items": strict([], podSelector=SELECTOR, namespaceSelector=SELECTOR)}
PORTS = {"type": "array", "items": strict(["port"], port={"type": "integer"}, protocol={"enum": ["TCP", "UDP"]})}
METADATA = strict(["name", "namespace"], name={"type": "string", "pattern": "^[a-z0-9-]+$"}, namespace=TEXT)
KUBERNETES = {
    "NetworkPolicy": strict(
        ["podSelector", "policyTypes"],
        podSelector=SELECTOR,
        policyTypes={"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
        ingress={
            "type": "array",
            "items": {**strict(["from"], ports=PORTS), "properties": {"from": PEERS, "ports": PORTS}},
        },
        egress={"type": "array", "items": strict(["to"], to=PEERS, ports=PORTS)},
    ),
    "PersistentVolumeClaim": strict(
        ["accessModes", "resources"],
        accessModes={"type": "array", "items": {"enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"]}},
        resources=strict(["requests"], requests=strict(["storage"], storage=TEXT)),
    ),
}
VERSIONS = {"NetworkPolicy": "networking.k8s.io/v1", "PersistentVolumeClaim": "v1"}


def documents():
    for path in sorted(FOLDER.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield path.name, document


DOCUMENTS = list(documents())


def of_kind(kind):
    return [document for _, document in DOCUMENTS if document["kind"] == kind]


def check(document):
    kind = document["kind"]
    if kind in KUBERNETES:
        whole = strict([], apiVersion={"const": VERSIONS[kind]}, kind=TEXT, metadata=METADATA, spec=KUBERNETES[kind])
    else:
        whole = {**FIELDS[kind], "required": ["apiVersion", "kind", "metadata", "spec"]}
        assert document["apiVersion"] == "ray.io/v1"
    jsonschema.validate(document, whole)


@pytest.mark.parametrize(("name", "document"), DOCUMENTS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_field_is_known(name, document):
    check(document)
    assert document["metadata"]["namespace"] == "medfl"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("RayCluster", lambda spec: spec["headGroupSpec"].update(rayStartParam={})),
        ("RayCluster", lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].update(images="x")),
        ("RayCluster", lambda spec: spec["authOptions"].update(mode="none")),
        ("RayService", lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][0].pop("groupName")),
        ("RayJob", lambda spec: spec.update(entrypoint=["medfl-ray"])),
        ("NetworkPolicy", lambda spec: spec.update(ingres=[])),
    ],
)
def test_a_mistake_is_found(kind, change):
    document = json.loads(json.dumps(of_kind(kind)[0]))
    change(document["spec"])
    with pytest.raises(jsonschema.ValidationError):
        check(document)


def clusters():
    return [of_kind("RayCluster")[0]["spec"], of_kind("RayService")[0]["spec"]["rayClusterConfig"]]


def pods():
    for cluster in clusters():
        yield from [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def containers():
    for pod in pods():
        yield from [*pod["spec"]["initContainers"], *pod["spec"]["containers"]]


def test_rays_version_and_the_images_are_the_projects():
    installed = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert {cluster["rayVersion"] for cluster in clusters()} == {installed}
    built = re.findall(
        r"^#.* -t (\S+)", "\n".join(p.read_text() for p in (ROOT / "deploy/docker").glob("Dockerfile*")), re.M
    )
    assert {container["image"] for container in containers()} <= set(built)


def test_token_and_tls_are_on_in_every_container_and_nothing_runs_as_root():
    for cluster in clusters():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "medfl-cluster"}
    from actors.cluster_secrets import node_environment

    expected = node_environment(Path("/etc/medfl/secrets"), Path("/etc/medfl/node"))
    for pod in pods():
        environment = {entry["name"]: entry.get("value") for entry in pod["spec"]["containers"][0]["env"]}
        tls = {name: value for name, value in expected.items() if "TLS" in name or "USAGE" in name}
        assert environment.items() >= tls.items()
        assert pod["spec"]["automountServiceAccountToken"] is False
    assert all(container["securityContext"]["runAsNonRoot"] for container in containers())


def test_only_the_init_container_sees_the_authoritys_key():
    for pod in pods():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for container in [*pod["spec"]["initContainers"], *pod["spec"]["containers"]]:
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts <= set(volumes)
            assert ("authority" in mounts) == (container["name"] == "certificate")
        keys = {item["key"] for item in volumes["secrets"]["secret"]["items"]}
        assert keys <= {"ca.pem", "serve_tokens.json"}


def test_what_pods_mount_is_made_by_the_readme_or_by_storage():
    claims = {document["metadata"]["name"] for document in of_kind("PersistentVolumeClaim")}
    for pod in pods():
        for volume in pod["spec"]["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            if "secret" in volume:
                assert f"secret generic {volume['secret']['secretName']} " in README
            if "configMap" in volume:
                assert f"configmap {volume['configMap']['name']} " in README


def test_commands_and_the_serving_application_exist(tmp_path):
    from typer.testing import CliRunner

    from actors.cluster_secrets import make_secrets
    from medfl_ray.cli.main import app
    from serve.settings import ServeSettings

    make_secrets(tmp_path / "authority")
    command = next(container["command"] for container in containers() if container["name"] == "certificate")
    values = {
        "/etc/medfl/authority": str(tmp_path / "authority"),
        "/etc/medfl/node": str(tmp_path / "node"),
        "$(POD_IP)": "10.0.0.7",
        "$(SERVICE)": "medfl-head-svc.medfl.svc.cluster.local",
    }
    assert command[0] == "medfl-ray"
    answer = CliRunner().invoke(app, [values.get(word, word) for word in command[1:]])
    assert answer.exit_code == 0, answer.output
    assert (tmp_path / "node" / "node.pem").exists()
    entrypoint = of_kind("RayJob")[0]["spec"]["entrypoint"].split()
    assert entrypoint[:2] == ["medfl-ray", "run"]
    mounted = {mount["mountPath"] for container in containers() for mount in container["volumeMounts"]}
    assert {"/etc/medfl/run", "/runs"} <= mounted
    served = yaml.safe_load(of_kind("RayService")[0]["spec"]["serveConfigV2"])["applications"][0]
    assert served["import_path"] == "serve.app:build"
    settings = ServeSettings.model_validate(served["args"])
    assert str(settings.models) in mounted
    assert settings.scaling.num_gpus == 1


def test_each_hospitals_worker_is_on_its_machine_with_its_resource_and_ledger():
    groups = of_kind("RayCluster")[0]["spec"]["workerGroupSpecs"]
    assert {group["groupName"] for group in groups} == {"north", "south"}
    for group in groups:
        name, pod = group["groupName"], group["template"]["spec"]
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {f"hospital:{name}": 1}
        assert pod["nodeSelector"] == {"medfl-ray/hospital": name}
        assert f"medfl-ray/hospital={name}" in README
        assert {"name": "MEDFL_STATE_DIR", "value": "/var/lib/medfl"} in pod["containers"][0]["env"]
        assert {"name": "state", "mountPath": "/var/lib/medfl"} in pod["containers"][0]["volumeMounts"]
        assert group["minReplicas"] == group["maxReplicas"] == group["replicas"] == 1


def test_the_job_runs_on_the_cluster_and_is_not_tried_again():
    job = of_kind("RayJob")[0]["spec"]
    assert job["clusterSelector"]["ray.io/cluster"] == of_kind("RayCluster")[0]["metadata"]["name"]
    assert job["backoffLimit"] == 0
    assert job["submissionMode"] == "HTTPMode"


def test_the_network_is_closed_but_for_what_is_named():
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind("NetworkPolicy")}
    assert policies["medfl-default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ours = {"app.kubernetes.io/part-of": "medfl"}
    assert all(pod["metadata"]["labels"] == ours for pod in pods())
    for name, policy in policies.items():
        for rule in policy.get("ingress", []):
            assert rule["from"], name  # an empty list would let everybody in
            if rule["from"] != [{"podSelector": {"matchLabels": ours}}]:
                assert {port["port"] for port in rule["ports"]} <= {8265, 8000, 8080}
