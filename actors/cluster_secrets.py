"""What the nodes of one Ray cluster share: a token and a certificate authority; and each node's own certificate.

Anyone who has this folder can run code on the cluster, as the token alone already allows: one trust domain.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from medfl_ray.errors import ClusterError

TOKEN, CA_CERTIFICATE, CA_KEY = "auth_token", "ca.pem", "ca_key.pem"
NODE_CERTIFICATE, NODE_KEY, ENVIRONMENT = "node.pem", "node_key.pem", "ray.env"
ALWAYS = ("127.0.0.1", "localhost")
DAYS = 365


def make_secrets(folder: Path) -> None:
    """Write a new token and a new certificate authority, readable by their owner alone.

    Raises:
      ClusterError: the folder already holds some of them; a running cluster would no longer know its nodes.
    """
    known = [name for name in (TOKEN, CA_CERTIFICATE, CA_KEY) if (folder / name).exists()]
    if known:
        raise ClusterError(
            f"{folder.name} already has {known[0]}; the nodes of a running cluster use it. Remove the folder to make "
            "new secrets, and start the cluster again"
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "medfl-ray cluster")])
    certificate = (
        _certificate(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder / TOKEN, secrets.token_hex(32).encode())
    _write(folder / CA_CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
    _write(folder / CA_KEY, _pem(key))


def make_node(secrets_folder: Path, out: Path, names: Sequence[str]) -> None:
    """Write a node's key, its certificate and the environment in which its Ray starts.

    Args:
      names: addresses and host names under which other nodes reach this one; loopback is always among them.

    Raises:
      ClusterError: the secrets are missing or cannot be read.
    """
    try:
        authority = x509.load_pem_x509_certificate((secrets_folder / CA_CERTIFICATE).read_bytes())
        signer = serialization.load_pem_private_key((secrets_folder / CA_KEY).read_bytes(), None)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"the certificate authority in {secrets_folder.name} cannot be read ({type(error).__name__}); make it "
            "with medfl-ray cluster secrets and hand it to every node"
        ) from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise ClusterError(
            f"{CA_KEY} in {secrets_folder.name} is not of the kind that medfl-ray cluster secrets makes; make new ones"
        )
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "medfl-ray node")])
    certificate = (
        _certificate(subject, authority.subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in dict.fromkeys((*names, *ALWAYS))]),
            critical=False,
        )
        .sign(signer, hashes.SHA256())
    )
    _write(out / NODE_KEY, _pem(key))
    _write(out / NODE_CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
    _write(out / ENVIRONMENT, _environment(secrets_folder.absolute(), out.absolute()).encode())


def node_environment(secrets_folder: Path, node_folder: Path) -> dict[str, str]:
    """Return the environment of a node's Ray: token and mutual TLS on, nothing reported to anybody."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(secrets_folder / TOKEN),
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(node_folder / NODE_CERTIFICATE),
        "RAY_TLS_SERVER_KEY": str(node_folder / NODE_KEY),
        "RAY_TLS_CA_CERT": str(secrets_folder / CA_CERTIFICATE),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # gRPC else ends the process that the client port forks for a client, now and then (ray-project/ray #63202).
        "GRPC_ENABLE_FORK_SUPPORT": "0",
    }


def _environment(secrets_folder: Path, node_folder: Path) -> str:
    lines = [f"export {name}='{value}'" for name, value in node_environment(secrets_folder, node_folder).items()]
    return "\n".join(["# Read by the shell that starts Ray on this node.", *lines, ""])


def _certificate(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))  # clocks of nodes differ
        .not_valid_after(now + dt.timedelta(days=DAYS))
    )


def _key_usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
