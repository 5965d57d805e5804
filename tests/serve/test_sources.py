"""Where models come from: folders and the registry."""

import asyncio

import pytest
from model_registry import lineage
from tiny_models import promote, write_model

from medfl_ray.errors import ArtifactDamaged, ConfigError, MedflError
from medfl_ray.store.registry.promotion import Gate
from medfl_ray.store.registry.registry import Registry
from serve.refusals import NotServed
from serve.replicas.model_loader import Catalogue, ModelKey, Offer
from serve.replicas.sources import FolderSource, RegistrySource, open_source, served_name
from serve.settings import ServeSettings


def test_a_folder_with_versions(tmp_path):
    for version in (1, 2, 10):
        write_model(tmp_path / "a" / str(version), mark=1)
    write_model(tmp_path / "b", mark=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "notes").mkdir()
    source = FolderSource(tmp_path)
    assert source.offers() == {"a": Offer(("1", "2", "10"), "10"), "b": Offer(("1",), "1")}
    promote(tmp_path, 2, "a")
    assert source.offers()["a"].champion == "2"
    assert source.package(ModelKey("a", "10"), tmp_path / "unused") == tmp_path / "a" / "10"
    for key in (ModelKey("a", "3"), ModelKey("a", "../b"), ModelKey("c", "1")):
        with pytest.raises(NotServed):
            source.package(key, tmp_path / "unused")


def test_a_run_or_a_package_alone(tmp_path):
    write_model(tmp_path / "run", mark=1, name="brain tumour (2 sites)")
    assert FolderSource(tmp_path / "run").offers() == {"brain-tumour-2-sites": Offer(("1",), "1")}
    assert served_name("äöü") == "model"


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match="no folder 'nothing'"):
        FolderSource(tmp_path / "nothing")


def test_either_a_folder_or_a_registry(tmp_path):
    with pytest.raises(ConfigError, match="both"):
        open_source(ServeSettings(models=tmp_path, registry="x"))
    assert isinstance(open_source(ServeSettings(models=tmp_path)), FolderSource)
    assert isinstance(open_source(ServeSettings(registry=str(tmp_path))), RegistrySource)


def test_the_environment_fills_the_settings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDFL_MODELS", "packages")
    monkeypatch.setenv("MEDFL_REGISTRY", "for the other commands")
    monkeypatch.setenv("MEDFL_SERVE_TOKENS", "/etc/tokens.json")
    settings = ServeSettings.from_environment()
    assert settings.models == tmp_path / "packages"  # another process would take a relative path for another folder
    assert str(settings.tokens) == "/etc/tokens.json"
    assert settings.registry is None


@pytest.fixture
def registry(tmp_path):
    """A registry with two versions of one model; none is promoted."""
    registry = Registry(tmp_path / "registry")
    for mark in (1, 2):
        write_model(tmp_path / f"package-{mark}", mark=mark)
        registry.register("tiny", tmp_path / f"package-{mark}", lineage())
    return registry


def test_a_registrys_champion_is_served_and_every_version_may_be_asked_for(registry, tmp_path):
    source = RegistrySource(registry)
    assert source.offers() == {"tiny": Offer(("1", "2"), None)}
    registry.promote("tiny", 1, gate=Gate())
    assert source.offers()["tiny"].champion == "1"
    registry.promote("tiny", 2, gate=Gate())
    assert source.offers()["tiny"].champion == "2"
    registry.rollback("tiny")
    assert source.offers()["tiny"].champion == "1"
    folder = source.package(ModelKey("tiny", "2"), tmp_path / "fetched")
    assert (folder / "model.onnx").read_bytes() == (tmp_path / "package-2" / "model.onnx").read_bytes()


def test_a_withdrawn_version_is_not_served_by_number_either(registry):
    source = RegistrySource(registry)
    registry.promote("tiny", 1, gate=Gate())
    registry.promote("tiny", 2, gate=Gate())
    assert source.offers() == {"tiny": Offer(("1", "2"), "2")}  # a former champion may still be asked for
    registry.retire("tiny", 1, "trained on a wrong label")
    assert source.offers() == {"tiny": Offer(("2",), "2")}
    catalogue = Catalogue(source, describe_nothing)
    asyncio.run(catalogue.refresh())
    with pytest.raises(NotServed, match="no version '1'"):
        catalogue.resolve("tiny", "1")
    registry.retire("tiny", 2, "a patient withdrew consent", leave_none=True)
    assert source.offers() == {"tiny": Offer((), None)}
    registry.promote("tiny", 1, gate=Gate(), override="the label was right after all")
    assert source.offers() == {"tiny": Offer(("1",), "1")}


async def describe_nothing(key):
    return key


def test_a_damaged_artifact_is_not_served(registry, tmp_path):
    source = RegistrySource(registry)
    (artifact,) = {version.files["model.onnx"] for version in registry.versions("tiny") if version.version == 1}
    (path,) = [file for file in (tmp_path / "registry").rglob("*") if artifact.sha256 in str(file) and file.is_file()]
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(ArtifactDamaged):
        source.package(ModelKey("tiny", "1"), tmp_path / "fetched")
    with pytest.raises(MedflError):
        source.package(ModelKey("tiny", "7"), tmp_path / "fetched")
