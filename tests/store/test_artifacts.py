"""Files under their SHA-256: the same contract in a folder and on S3, one flipped bit refused, kills harmless."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from medfl_ray.errors import ArtifactDamaged, RegistryError
from medfl_ray.store.registry.artifacts import Artifact, ArtifactStore

ROOT = Path(__file__).parents[2]
CONTENT = b"sixteen weights!" * 200_000


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    return request.getfixturevalue("bucket") if request.param == "s3" else str(tmp_path / "store")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(CONTENT)
    return path


def blob_of(place, artifact):
    return f"{place}/blobs/sha256/{artifact.sha256[:2]}/{artifact.sha256}"


def change(place, artifact, content):
    """Put other content in an artifact's place, as a damaged disk or an attacker would."""
    with fsspec.open(blob_of(place, artifact), "wb") as stream:
        stream.write(content)


def test_what_was_put_comes_back(place, source, tmp_path):
    artifact = ArtifactStore(place).put(source)
    assert artifact.size_bytes == len(CONTENT)
    ArtifactStore(place).get(artifact, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == CONTENT
    ArtifactStore(place).check(artifact)


@pytest.mark.parametrize("position", [0, len(CONTENT) // 2, len(CONTENT) - 1])
def test_one_flipped_bit_is_refused(place, source, tmp_path, position):
    store = ArtifactStore(place)
    artifact = store.put(source)
    flipped = bytearray(CONTENT)
    flipped[position] ^= 1
    change(place, artifact, bytes(flipped))
    with pytest.raises(ArtifactDamaged, match="does not have the content"):
        store.get(artifact, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(ArtifactDamaged):
        store.check(artifact)
    assert store.put(source) == artifact  # registering the model again repairs it
    store.check(artifact)


def test_a_shorter_file_is_refused_before_it_is_copied(place, source, tmp_path):
    store = ArtifactStore(place)
    artifact = store.put(source)
    change(place, artifact, CONTENT[:-1])
    with pytest.raises(ArtifactDamaged):
        store.get(artifact, tmp_path / "back")


def test_a_file_that_is_gone_is_named_so(place, tmp_path):
    missing = Artifact(sha256="0" * 64, size_bytes=1)
    for refused in (lambda s: s.get(missing, tmp_path / "back"), lambda s: s.check(missing)):
        with pytest.raises(ArtifactDamaged, match="is gone"):
            refused(ArtifactStore(place))


def test_a_file_that_cannot_be_read_is_one_sentence(place, tmp_path):
    with pytest.raises(RegistryError, match="cannot be written"):
        ArtifactStore(place).put(tmp_path / "absent")


def test_a_bucket_that_does_not_answer_is_one_sentence(monkeypatch, source):
    for name, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "hidden-secret"}.items():
        monkeypatch.setenv(name, value)
    options = {"client_kwargs": {"endpoint_url": "http://127.0.0.1:9", "region_name": "us-east-1"},
               "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1}}  # fmt: skip
    store = ArtifactStore("s3://models/registry", options)
    store._fs.retries = 1
    with pytest.raises(RegistryError) as raised:
        store.put(source)
    assert "check" in str(raised.value)
    assert "hidden-secret" not in str(raised.value)
    assert "127.0.0.1" not in str(raised.value)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(RegistryError, match="extra"):
        ArtifactStore("nowhere://models")


def put_in_a_process(place, source, failpoint):
    code = (
        "import sys; from pathlib import Path; from medfl_ray.store.registry.artifacts import ArtifactStore; "
        "ArtifactStore(sys.argv[1]).put(Path(sys.argv[2]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MEDFL_FAILPOINT": failpoint}
    command = [sys.executable, "-c", code, place, str(source)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_killed_before_the_file_has_its_name_nothing_is_there(source, tmp_path):
    place = str(tmp_path / "store")
    killed = put_in_a_process(place, source, "registry.artifact.copied")
    assert killed.returncode == -signal.SIGKILL
    assert not list((tmp_path / "store").rglob("blobs/sha256/*/*"))
    artifact = ArtifactStore(place).put(source)
    ArtifactStore(place).check(artifact)


def test_a_full_disk_leaves_nothing_half_written(source, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFL_FAILPOINT", "registry.artifact.copied:1:enospc")
    with pytest.raises(RegistryError, match="No space left"):
        ArtifactStore(str(tmp_path / "store")).put(source)
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
