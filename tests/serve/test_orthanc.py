"""A mask goes to a real PACS, Orthanc on loopback, by STOW-RS, and comes back the same.

Skipped only where Orthanc is not installed: `make orthanc` installs it on Debian and Ubuntu.
"""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import time
import zipfile
from pathlib import Path

import highdicom
import numpy as np
import pytest
from clinic_service import clinic_service
from dicom_builder import DicomBuilder
from dicomweb_client.api import DICOMwebClient
from local_service import running
from pydicom.uid import generate_uid

from medfl_ray.data.volume import LPS_TO_RAS
from serve.clinic.pacs_target import PacsTarget

ORTHANC = shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
PLUGINS = sorted(Path("/usr/lib/orthanc").glob("libOrthancDicomWeb.so*"))
pytestmark = pytest.mark.skipif(not (ORTHANC and PLUGINS), reason="Orthanc with DICOMweb is absent; make orthanc")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orthanc")
    port = free_port()
    settings = {
        "Name": "test", "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
        "RemoteAccessAllowed": False, "AuthenticationEnabled": True, "RegisteredUsers": {"medfl": "a-password"},
        "HttpPort": port, "HttpBindAddresses": ["127.0.0.1"], "DicomServerEnabled": False,
        "Plugins": [str(PLUGINS[0])], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([ORTHANC, str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
                assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/dicom-web"
    finally:
        process.terminate()
        process.wait(20)


def zipped(folder):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    return buffer.getvalue()


@pytest.fixture
def client(orthanc, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFL_TEST_USER", "medfl")
    monkeypatch.setenv("MEDFL_TEST_PASSWORD", "a-password")
    target = PacsTarget(name="archive", url=orthanc, username_env="MEDFL_TEST_USER", password_env="MEDFL_TEST_PASSWORD")
    with running(clinic_service(tmp_path / "service", pacs=[target], roles=("infer", "store"))) as client:
        yield client


def fetch(orthanc, builder, modality):
    import requests

    with requests.Session() as session:
        session.auth = ("medfl", "a-password")
        web = DICOMwebClient(orthanc, session=session)
        found = web.search_for_series(builder.uids["study"], search_filters={"Modality": modality})
        assert len(found) == 1
        series = found[0]["0020000E"]["Value"][0]
        (dataset,) = web.retrieve_series(builder.uids["study"], series)
    return dataset


def test_a_segmentation_comes_back_from_the_pacs_with_the_same_mask(client, orthanc, tmp_path):
    builder = DicomBuilder(f"PAT{generate_uid()[-8:]}")
    body = zipped(builder.save(tmp_path / "series"))
    answer = client.post("/v2/models/bright/segment", content=body, params={"output": "dicom-seg", "store": "archive"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Stored-In"] == "archive"
    returned = highdicom.seg.Segmentation.from_dataset(fetch(orthanc, builder, "SEG"))
    grid = highdicom.VolumeGeometry(LPS_TO_RAS @ builder.affine_ras, builder.shape, "PATIENT")
    values = builder.stored * 2.0 - 1000
    labels = [segment.SegmentLabel for segment in returned.SegmentSequence]
    assert labels == ["liver", "tumour"]
    volume = returned.get_volume(segment_numbers=[1, 2], combine_segments=False).match_geometry(grid)
    assert np.array_equal(volume.array[..., 0] > 0, (values > 100) & (values <= 1000))
    assert np.array_equal(volume.array[..., 1] > 0, values > 1000)
    assert returned.FrameOfReferenceUID == builder.uids["frame"]


def test_contours_are_stored_too(client, orthanc, tmp_path):
    builder = DicomBuilder()
    body = zipped(builder.save(tmp_path / "series"))
    answer = client.post("/v2/models/bright/segment", content=body, params={"output": "rtstruct", "store": "archive"})
    assert answer.status_code == 200, answer.text
    assert fetch(orthanc, builder, "RTSTRUCT").StructureSetROISequence[0].ROIName == "liver"


def test_a_nifti_result_is_not_for_a_pacs(client):
    answer = client.post("/v2/models/bright/segment", content=b"x", params={"store": "archive"})
    assert answer.status_code == 400
    assert "dicom-seg" in answer.json()["error"]
