"""A cluster's secrets: readable by their owner alone, never made twice, and certificates that verify."""

import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID

from actors.cluster_secrets import make_node, make_secrets
from medfl_ray.errors import ClusterError


@pytest.fixture
def made(tmp_path):
    make_secrets(tmp_path / "secrets")
    make_node(tmp_path / "secrets", tmp_path / "node", ["10.0.0.7", "north.example.org"])
    return tmp_path


def test_a_nodes_certificate_is_the_authoritys_and_names_it(made):
    authority = x509.load_pem_x509_certificate((made / "secrets" / "ca.pem").read_bytes())
    node = x509.load_pem_x509_certificate((made / "node" / "node.pem").read_bytes())
    node.verify_directly_issued_by(authority)
    names = node.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "127.0.0.1"]
    assert names.get_values_for_type(x509.DNSName) == ["north.example.org", "localhost"]
    assert node.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert isinstance(node.public_key(), ec.EllipticCurvePublicKey)


def test_only_the_owner_reads_them(made):
    for path in [*(made / "secrets").iterdir(), *(made / "node").iterdir()]:
        assert path.stat().st_mode & 0o077 == 0, path.name
    assert len((made / "secrets" / "auth_token").read_text()) == 64


def test_the_environment_switches_token_and_tls_on(made):
    script = f". {made}/node/ray.env; env"
    said = subprocess.run(
        ["sh", "-c", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    environment = dict(line.split("=", 1) for line in said.stdout.splitlines())
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_USE_TLS"] == "1"
    assert environment["GRPC_ENABLE_FORK_SUPPORT"] == "0"
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"):
        assert (made / environment[name]).exists()


def test_a_running_clusters_secrets_are_not_overwritten(made):
    before = (made / "secrets" / "auth_token").read_text()
    with pytest.raises(ClusterError, match="already has auth_token"):
        make_secrets(made / "secrets")
    assert (made / "secrets" / "auth_token").read_text() == before


@pytest.mark.parametrize("spoil", [lambda f: (f / "ca.pem").unlink(), lambda f: (f / "ca_key.pem").write_text("x")])
def test_secrets_that_cannot_be_read_are_one_sentence_without_a_path(made, spoil):
    spoil(made / "secrets")
    with pytest.raises(ClusterError, match="medfl-ray cluster secrets") as caught:
        make_node(made / "secrets", made / "other", ["10.0.0.8"])
    assert str(made) not in str(caught.value)
    assert not (made / "other").exists()


def test_the_commands_make_them(tmp_path):
    cli = [sys.executable, "-m", "medfl_ray.cli.main", "cluster"]
    for words in (["secrets", "s"], ["node", "s", "10.0.0.7", "--out", "n"]):
        done = subprocess.run([*cli, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "n").iterdir()) == ["node.pem", "node_key.pem", "ray.env"]


def test_every_ray_of_ours_is_started_in_one_place():
    """What `connect` switches on holds for every entry point: nothing else of the project starts Ray."""
    from pathlib import Path

    root = Path(__file__).parents[2]
    places = {
        str(path.relative_to(root))
        for package in ("medfl_ray", "actors", "serve", "tune", "examples", "benchmarks")
        for path in (root / package).rglob("*.py")
        if "ray.init(" in path.read_text(encoding="utf-8")
    }
    assert places == {"actors/cluster.py"}
