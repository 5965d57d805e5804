"""Volumes in, masks out: over HTTP, with a model that marks bright voxels."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import time
import zipfile
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pydicom
import pytest
from clinic_service import LABELS, clinic_service
from dicom_builder import DicomBuilder
from local_service import running

from medfl_ray.data.formats.contours import fill_regions
from medfl_ray.data.uploads.limits import UploadLimits
from medfl_ray.data.volume import Volume
from serve.auth import add_token, revoke_token
from serve.clinic.jobs import JobBook, JobLimits, JobState
from serve.clinic.service import SegmentationService, SegmentRequest
from serve.refusals import NotServed, TooMany

SEGMENT = "/v2/models/bright/segment"
AFFINE = np.array([[-1.5, 0, 0, 40], [0, 0.9, 0.1, -30], [0, -0.1, 2.0, 5], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    return clinic_service(
        tmp_path_factory.mktemp("clinic"), UploadLimits(max_upload_bytes=3_000_000), jobs=JobLimits(max_per_owner=3)
    )


@pytest.fixture(scope="module")
def client(service):
    with running(service) as client:
        yield client


def image(shape=(11, 13, 9), seed=0):
    """Noise around 0, with a bright box and a brighter one in it."""
    values = np.random.default_rng(seed).normal(0, 10, shape).astype(np.float32)
    values[2:7, 3:9, 2:6] += 500
    values[3:5, 4:6, 3:5] += 2000
    return values


def truth(values):
    return ((values > 100).astype(np.uint8) + (values > 1000)).astype(np.uint8)


def nifti_bytes(values, affine=AFFINE):
    return gzip.compress(nib.Nifti1Image(values, affine).to_bytes())


def zipped(folder):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*.dcm")):
            archive.write(path, f"study/{path.name}")
        archive.writestr("README.txt", "written by an archive")
    return buffer.getvalue()


@pytest.fixture
def series(tmp_path):
    builder = DicomBuilder()
    return builder, zipped(builder.save(tmp_path / "series"))


def read_nifti(body):
    return nib.Nifti1Image.from_bytes(gzip.decompress(body))


def test_nifti_in_nifti_out(client):
    values = image()
    answer = client.post(SEGMENT, content=nifti_bytes(values))
    assert answer.status_code == 200, answer.text
    mask = read_nifti(answer.content)
    assert np.array_equal(np.asarray(mask.dataobj), truth(values))
    assert np.allclose(mask.affine, AFFINE, atol=1e-5)
    assert answer.headers["X-Model-Name"] == "bright"
    assert answer.headers["X-Model-Version"] == "3"
    voxel_ml = abs(np.linalg.det(AFFINE[:3, :3])) / 1000
    volumes = json.loads(answer.headers["X-Volumes-Ml"])
    assert volumes == pytest.approx(
        {name: int((truth(values) == value).sum()) * voxel_ml for value, name in LABELS.items()}, abs=1e-4
    )


def test_a_form_and_a_named_version_do_the_same(client):
    values = image(seed=1)
    files = {"file": ("scan.nii.gz", nifti_bytes(values))}
    answer = client.post("/v2/models/bright/versions/3/segment", files=files, params={"output": "nrrd"})
    assert answer.status_code == 200, answer.text
    assert answer.content.startswith(b"NRRD")
    assert 'filename="mask.seg.nrrd"' in answer.headers["content-disposition"]


def test_a_dicom_series_comes_back_as_seg_and_contours(client, series):
    builder, body = series
    expected = truth(builder.stored * 2.0 - 1000)
    seg = client.post(SEGMENT, content=body, params={"output": "dicom-seg"})
    assert seg.status_code == 200, seg.text
    assert seg.headers["content-type"] == "application/dicom"
    read = pydicom.dcmread(io.BytesIO(seg.content))
    assert [s.SegmentLabel for s in read.SegmentSequence] == ["liver", "tumour"]
    assert read.FrameOfReferenceUID == builder.uids["frame"]
    assert int(np.asarray(read.pixel_array).sum()) == int((expected > 0).sum())
    plan = client.post(SEGMENT, content=body, params={"output": "rtstruct"})
    filled = fill_regions(
        pydicom.dcmread(io.BytesIO(plan.content)),
        {1: 1},
        Volume(np.zeros((1, *builder.shape), np.float32), builder.affine_ras),
    )
    assert np.array_equal(filled[1], expected == 1)


@pytest.mark.parametrize("output", ["dicom-seg", "rtstruct"])
def test_the_serving_process_parses_no_header(client, series, output, monkeypatch):
    def parse(files):
        raise AssertionError("parsed outside the confined process")

    monkeypatch.setattr("medfl_ray.data.uploads.read.headers_of", parse)
    answer = client.post(SEGMENT, content=series[1], params={"output": output, "bundle": "true"})
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as bundle:
        (name,) = [name for name in bundle.namelist() if name.endswith(".dcm")]
        assert pydicom.dcmread(io.BytesIO(bundle.read(name))).Modality in ("SEG", "RTSTRUCT")


def test_a_bundle_has_mask_volumes_and_picture(client):
    answer = client.post(SEGMENT, content=nifti_bytes(image()), params={"bundle": "true"})
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert sorted(archive.namelist()) == ["mask.nii.gz", "overlay.png", "volumes.json"]
        words = json.loads(archive.read("volumes.json"))
        assert archive.read("overlay.png").startswith(b"\x89PNG")
    assert words["labels"] == {"1": "liver", "2": "tumour"}
    assert words["shape"] == [11, 13, 9]


@pytest.mark.parametrize(("output", "start"), [("png", b"\x89PNG"), ("json", b"{")])
def test_picture_and_volumes_alone(client, output, start):
    assert client.post(SEGMENT, content=nifti_bytes(image()), params={"output": output}).content.startswith(start)


def test_two_series_are_chosen_by_uid_or_refused_without_one(client, tmp_path):
    first, second = DicomBuilder(), DicomBuilder()
    second.slices[0].SeriesDescription = "SECRET"
    first.save(tmp_path / "both" / "a")
    second.save(tmp_path / "both" / "b")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in (tmp_path / "both").rglob("*.dcm"):
            archive.write(path, f"{path.parent.name}/{path.name}")
    refused = client.post(SEGMENT, content=buffer.getvalue())
    assert refused.status_code == 422
    assert "2 image series with 6, 6 files" in refused.json()["error"]
    assert first.uids["series"] not in refused.text
    chosen = client.post(SEGMENT, content=buffer.getvalue(), params={"series": first.uids["series"]})
    assert chosen.status_code == 200, chosen.text
    assert client.post(SEGMENT, content=buffer.getvalue(), params={"series": "1.2.3"}).status_code == 422


@pytest.mark.parametrize(
    ("params", "status", "words"),
    [
        ({"output": "dicom-seg"}, 422, "send the DICOM series"),
        ({"output": "exe"}, 400, "output"),
        ({"series": "../../etc"}, 400, "series"),
        ({"store": "http://169.254.169.254/"}, 400, "store"),
        ({"store": "elsewhere"}, 403, "no role 'store'"),
    ],
)
def test_wishes_that_cannot_be_met(client, params, status, words):
    answer = client.post(SEGMENT, content=nifti_bytes(image()), params=params)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]


def test_a_token_for_storing_may_name_a_pacs(client, service):
    headers = {"Authorization": f"Bearer {add_token(service.tokens, 'storing', ('infer', 'store'))}"}
    service.look_at_tokens_again()
    answer = client.post(SEGMENT, content=nifti_bytes(image()), params={"store": "elsewhere"}, headers=headers)
    assert answer.status_code == 404
    assert "no PACS of that name" in answer.json()["error"]


def test_a_request_keeps_to_the_version_it_came_in_with(tmp_path):
    """A promotion while a body arrives changes nothing for its request."""
    clinic = SegmentationService(_Promoted(), root=tmp_path)
    assert asyncio.run(clinic.check(SegmentRequest("bright", None))).version == "3"


class _Promoted:
    async def summary(self, model, version=None):
        return SimpleNamespace(name=model, version=version or "3", description=SimpleNamespace(task="segmentation"))


def test_an_unknown_model_is_refused_before_its_body_is_read(client):
    assert client.post("/v2/models/nobody/segment", content=b"x" * 1000).status_code == 404


def test_a_body_over_the_limit_is_refused_while_it_comes(client):
    def parts():
        for _ in range(100):
            yield b"x" * 100_000

    answer = client.post(SEGMENT, content=parts())
    assert answer.status_code == 413
    assert "3000000 bytes" in answer.json()["error"]


def finish(client, location, seconds=20):
    deadline = time.monotonic() + seconds
    while (state := client.get(location).json())["status"] not in ("done", "failed"):
        assert time.monotonic() < deadline, state
        time.sleep(0.05)
    return state


def test_a_job_runs_reports_and_gives_its_result_once_it_is_done(client, service):
    values = image()
    accepted = client.post(SEGMENT, content=nifti_bytes(values), params={"async": "true"})
    assert accepted.status_code == 202
    location = accepted.headers["location"]
    events = client.get(f"{location}/events")
    assert events.headers["content-type"].startswith("text/event-stream")
    last = events.text.strip().split("\n\n")[-1]
    assert last.startswith("event: end\ndata: ")
    assert json.loads(last.split("data: ")[1])["status"] == "done"
    assert finish(client, location)["progress"] == 1
    result = client.get(f"{location}/result")
    assert np.array_equal(np.asarray(read_nifti(result.content).dataobj), truth(values))
    assert result.headers["X-Model-Version"] == "3"
    other = add_token(service.tokens, f"other-{time.monotonic_ns()}")
    service.look_at_tokens_again()
    for path in (location, f"{location}/result", f"{location}/events"):
        assert client.get(path, headers={"Authorization": f"Bearer {other}"}).status_code == 404
    assert client.delete(location, headers={"Authorization": f"Bearer {other}"}).status_code == 404
    assert client.delete(location).status_code == 204
    assert client.get(location).status_code == 404


def test_a_later_token_of_the_same_name_has_no_part_in_what_the_first_one_left(client, service):
    headers = {"Authorization": f"Bearer {add_token(service.tokens, 'guest')}"}
    service.look_at_tokens_again()
    accepted = client.post(SEGMENT, content=nifti_bytes(image()), params={"async": "true"}, headers=headers)
    location = accepted.headers["location"]
    assert client.get(location, headers=headers).status_code == 200
    revoke_token(service.tokens, "guest")
    headers = {"Authorization": f"Bearer {add_token(service.tokens, 'guest')}"}
    service.look_at_tokens_again()
    assert client.get(location, headers=headers).status_code == 404
    assert client.get("/auth/token/valid", headers=headers).json() == {"username": "guest"}


def test_a_job_that_fails_says_why(client):
    accepted = client.post(SEGMENT, content=b"nonsense" * 100, params={"async": "true"})
    state = finish(client, accepted.headers["location"])
    assert state["status"] == "failed"
    assert "no known format" in state["error"]
    result = client.get(f"{accepted.headers['location']}/result")
    assert result.status_code == 409
    client.delete(accepted.headers["location"])


def test_a_token_has_so_many_jobs_and_no_more(client):
    answers = [client.post(SEGMENT, content=nifti_bytes(image()), params={"async": "true"}) for _ in range(4)]
    assert [a.status_code for a in answers] == [202, 202, 202, 429]
    for answer in answers[:3]:
        finish(client, answer.headers["location"])
        client.delete(answer.headers["location"])


@pytest.mark.parametrize("job", ["..%2f..%2fetc", "A" * 22, "A" * 400, "job.json"])
def test_made_up_jobs_are_not_found(client, job):
    assert client.get(f"/v2/jobs/{job}").status_code == 404


def test_jobs_expire_and_lost_replicas_are_noticed(tmp_path):
    book = JobBook(tmp_path / "jobs", JobLimits(max_jobs=2, keep_s=1000))
    lost, old = book.open("me"), book.open("me")
    with pytest.raises(TooMany):
        book.open("you")
    for state, change in ((lost, {"beat_at": time.time() - 60}), (old, {"expires_at": time.time() - 1})):
        changed = JobState.model_validate(state.model_dump() | change)
        (tmp_path / "jobs" / state.id / "job.json").write_text(changed.model_dump_json())
    assert book.get(lost.id, "me").status == "failed"
    with pytest.raises(NotServed):
        book.get(old.id, "me")
    book.open("you")
    assert not (tmp_path / "jobs" / old.id).exists()
