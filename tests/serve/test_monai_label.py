"""MONAI Label's protocol, spoken as 3D Slicer's plug-in speaks it: http.client and forms put together by hand."""

from __future__ import annotations

import email.parser
import email.policy
import http.client
import json
import mimetypes
import os
from urllib.parse import quote_plus

import nibabel as nib
import nrrd
import numpy as np
import pytest
from clinic_service import clinic_service
from local_service import running

from serve.auth import add_token

AFFINE = np.array([[-1.5, 0, 0, 40], [0, 0.9, 0, -30], [0, 0, 2.0, 5], [0, 0, 0, 1.0]])
BOUNDARY = "----------lImIt_of_THE_fIle_eW_$"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    return clinic_service(tmp_path_factory.mktemp("label"))


@pytest.fixture(scope="module")
def address(service):
    with running(service) as client:
        yield client.base_url.host, client.base_url.port


class Slicer:
    """The plug-in's client, in the little that matters."""

    def __init__(self, address, token):
        self._address, self._headers = address, {"Authorization": f"Bearer {token}"}

    def call(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection(*self._address, timeout=30)
        connection.request(method, path, body, {**self._headers, **(headers or {})})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer, content

    def form(self, method, path, fields, files):
        lines = []
        for name, value in fields.items():
            lines += [f"--{BOUNDARY}", f'Content-Disposition: form-data; name="{name}"', "", value]
        for name, file in files.items():
            kind = mimetypes.guess_type(file)[0] or "application/octet-stream"
            head = f'Content-Disposition: form-data; name="{name}"; filename="{os.fspath(file)}"'
            lines += [f"--{BOUNDARY}", head, f"Content-Type: {kind}", "", file.read_bytes()]
        lines += [f"--{BOUNDARY}--", ""]
        body = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\r\n" for line in lines)
        return self.call(method, path, body, {"content-type": f"multipart/form-data; boundary={BOUNDARY}"})


@pytest.fixture
def slicer(address, service):
    return Slicer(address, service.token)


@pytest.fixture
def image(tmp_path):
    values = np.random.default_rng(0).normal(0, 10, (7, 9, 11)).astype(np.float32)
    values[2:5, 3:6, 4:8] = 500
    path = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(values, AFFINE), path)
    return path, (values > 100).astype(np.uint8)


def parts_of(answer, content):
    """Take a multipart answer apart: fields, and files by their names."""
    head = f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + content)
    fields, files = {}, {}
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        if part.get_filename():
            files[part.get_filename()] = part.get_payload(decode=True)
        else:
            fields[name] = part.get_payload(decode=True).decode()
    return fields, files


def check_result(answer, content, expected, tmp_path):
    assert answer.status == 200, content
    assert "multipart" in answer.headers["content-type"]
    fields, files = parts_of(answer, content)
    params = json.loads(fields["params"])
    assert params["label_names"] == {"liver": 1, "tumour": 2}
    ((name, raw),) = files.items()
    assert name == "mask.nrrd"
    (tmp_path / name).write_bytes(raw)
    mask, header = nrrd.read(str(tmp_path / name))
    assert np.array_equal(mask, expected)
    assert header["space"] == "left-posterior-superior"
    assert np.allclose(header["space origin"], [-40, 30, 5])


PARAMS = {"params": json.dumps({"result_extension": ".nrrd", "result_dtype": "uint8", "client_id": "user-xyz"})}


def test_info_is_what_the_plug_in_looks_for(slicer):
    answer, content = slicer.call("GET", "/info/")
    info = json.loads(content)
    assert answer.status == 200
    assert info["labels"] == ["liver", "tumour"]
    model = info["models"]["bright"]
    assert (model["type"], model["dimension"], model["labels"]) == ("segmentation", 3, {"liver": 1, "tumour": 2})
    assert {"name", "trainers", "strategies", "scoring", "train_stats", "datastore", "config"} <= info.keys()
    assert (info["datastore"]["total"], info["datastore"]["completed"]) == (0, 0)


def test_a_session_is_opened_segmented_twice_and_closed(slicer, image, tmp_path):
    path, expected = image
    answer, content = slicer.form("PUT", "/session/", {"client_id": "user-xyz"}, {"files": path})
    assert answer.status == 200, content
    session = json.loads(content)["session_id"]
    assert slicer.call("GET", f"/session/{session}")[0].status == 200
    for _ in range(2):
        answer, content = slicer.form("POST", f"/infer/bright?image=x&session_id={quote_plus(session)}", PARAMS, {})
        check_result(answer, content, expected, tmp_path)
    assert slicer.call("DELETE", f"/session/{session}")[0].status == 200
    assert slicer.call("GET", f"/session/{session}")[0].status == 404
    assert slicer.form("POST", f"/infer/bright?session_id={session}", PARAMS, {})[0].status == 404


def test_a_file_may_come_with_the_request(slicer, image, tmp_path):
    path, expected = image
    answer, content = slicer.form("POST", "/infer/bright?image=", PARAMS, {"file": path})
    check_result(answer, content, expected, tmp_path)


@pytest.mark.parametrize(("output", "start"), [("image", b"\x1f\x8b"), ("json", b"{")])
def test_the_image_or_the_params_alone(slicer, image, output, start):
    answer, content = slicer.form("POST", f"/infer/bright?output={output}", {"params": "{}"}, {"file": image[0]})
    assert answer.status == 200, content
    assert content.startswith(start)


def test_a_session_belongs_to_its_token(slicer, address, service, image):
    _, content = slicer.form("PUT", "/session/", {}, {"files": image[0]})
    session = json.loads(content)["session_id"]
    stranger = Slicer(address, add_token(service.tokens, "stranger"))
    service.look_at_tokens_again()
    assert stranger.call("GET", "/info/")[0].status == 200
    assert stranger.call("GET", f"/session/{session}")[0].status == 404
    assert stranger.form("POST", f"/infer/bright?session_id={session}", PARAMS, {})[0].status == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/datastore/?output=all", 200), ("PUT", "/datastore/label?image=x", 501),
        ("PUT", "/datastore/?image=x", 501), ("GET", "/datastore/label?label=x&tag=y", 501),
        ("POST", "/activelearning/random", 501), ("GET", "/train/?check_if_running=true", 501),
        ("POST", "/train/bright", 501), ("POST", "/scoring/dice", 501), ("GET", "/auth/", 200),
        ("GET", "/auth/token/valid", 200),
    ],
)  # fmt: skip
def test_what_is_not_offered_says_so(slicer, method, path, status):
    answer, content = slicer.call(method, path)
    assert answer.status == status
    if status == 501:
        assert len(json.loads(content)["error"]) > 20


@pytest.mark.parametrize(
    ("path", "params", "status"),
    [
        ("/infer/nobody", "{}", 404), ("/infer/bright", "not json", 400), ("/infer/bright", "[]", 400),
        ("/infer/bright", '{"result_extension": ".exe"}', 400), ("/infer/bright?session_id=../../x", "{}", 404),
        ("/infer/bright?output=dicom_seg", "{}", 400),
    ],
)  # fmt: skip
def test_bad_requests_are_refused(slicer, image, path, params, status):
    answer, content = slicer.form("POST", path, {"params": params}, {"file": image[0]})
    assert answer.status == status, content


def test_a_request_without_an_image_is_refused(slicer):
    answer, content = slicer.form("POST", "/infer/bright?image=some-id", PARAMS, {})
    assert answer.status == 404
    assert "keeps no images" in json.loads(content)["error"]
