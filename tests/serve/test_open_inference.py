"""The Open Inference Protocol v2, as a client sees it."""

import json
import time

import numpy as np
import pytest
from local_service import local_service, running
from tiny_models import binary_request, json_request, promote, read_answer

from medfl_ray.export.description import read_description
from serve.protocols.open_inference import read_request
from serve.refusals import TooLarge

INFER = "/v2/models/tiny/infer"


def test_the_server_says_who_it_is(client):
    answer = client.get("/v2").json()
    assert answer["name"] == "medfl-ray"
    assert answer["extensions"] == ["binary_tensor_data"]


def test_a_model_describes_itself(client):
    answer = client.get("/v2/models/tiny").json()
    assert answer == {
        "name": "tiny",
        "versions": ["1", "2"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 1, -1, -1, -1]}],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, 4, -1, -1, -1]},
            {"name": "labels", "datatype": "UINT8", "shape": [-1, -1, -1, -1]},
        ],
    }
    assert client.get("/v2/models/tiny/versions/2").json()["versions"] == ["2"]
    assert client.get("/v2/models").json() == {"models": [{"name": "tiny", "version": "1"}]}


@pytest.mark.parametrize("path", ["/v2/models/tiny/ready", "/v2/models/tiny/versions/2/ready"])
def test_a_model_is_ready(client, path):
    assert client.get(path).json() == {"name": "tiny", "ready": True}


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/tiny/versions/9", "/v2/models/tiny/versions/9/ready"])
def test_what_is_not_served_is_not_found(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert list(answer.json()) == ["error"]


def test_an_unknown_route_has_the_same_form_of_error(client):
    answer = client.get("/v1/models")
    assert (answer.status_code, list(answer.json())) == (404, ["error"])


@pytest.mark.parametrize("nested", [False, True])
def test_json_tensors_in_and_out(client, nested):
    request = json_request((2, 1, 2, 2, 2))
    if nested:
        request["inputs"][0]["data"] = np.reshape(request["inputs"][0]["data"], (2, 1, 2, 2, 2)).tolist()
    answer = client.post(INFER, json={"id": "abc", **request})
    message = answer.json()
    assert (message["model_name"], message["model_version"], message["id"]) == ("tiny", "1", "abc")
    assert answer.headers["X-Model-Version"] == "1"
    logits, labels = message["outputs"]
    assert (logits["name"], logits["shape"], logits["datatype"]) == ("logits", [2, 4, 2, 2, 2], "FP32")
    assert np.reshape(logits["data"], logits["shape"])[:, 1].tolist() == np.full((2, 2, 2, 2), 5.0).tolist()
    assert (labels["name"], labels["shape"], labels["data"]) == ("labels", [2, 2, 2, 2], [1] * 16)


def test_binary_tensors_in_and_out(client):
    body, headers = binary_request((3, 1, 4, 4, 4), parameters={"binary_data_output": True})
    answer = client.post("/v2/models/tiny/versions/2/infer", content=body, headers=headers)
    message, tensors = read_answer(answer.content, int(answer.headers["Inference-Header-Content-Length"]))
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert message["model_version"] == "2"
    assert tensors["logits"].shape == (3, 4, 4, 4, 4)
    assert (tensors["labels"] == 2).all()


def test_only_the_outputs_that_are_asked_for(client):
    wanted = [{"name": "labels", "parameters": {"binary_data": True}}]
    answer = client.post(INFER, json={**json_request(), "outputs": wanted})
    message, tensors = read_answer(answer.content, int(answer.headers["Inference-Header-Content-Length"]))
    assert [output["name"] for output in message["outputs"]] == ["labels"]
    assert tensors["labels"].shape == (1, 4, 4, 4)


HOSTILE = {
    "no JSON": b"\x00\xff\xfe",
    "empty": b"",
    "not an object": b"[1, 2]",
    "deep": b"[" * 100_000,
    "no inputs": b'{"inputs": []}',
    "NaN": json.dumps(json_request(data=[float("nan")] * 64)).encode(),
    "infinite": json.dumps(json_request(data=[1e39] * 64)).encode(),
    "huge integers": json.dumps(json_request(data=[10**400] * 64)).encode(),
    "strings for numbers": json.dumps(json_request(data=["1"] * 64)).encode(),
    "booleans for numbers": json.dumps(json_request(data=[True] * 64)).encode(),
    "ragged": json.dumps(json_request(data=[[1, 2], [3]])).encode(),
    "an object for data": json.dumps(json_request(data={"a": 1})).encode(),
    "no data": json.dumps(json_request(data=None)).encode(),
    "too few values": json.dumps(json_request(data=[1.0] * 63)).encode(),
    "negative shape": json.dumps({"inputs": [{**json_request()["inputs"][0], "shape": [-1, 1, 4, 4, 4]}]}).encode(),
    "absurd shape": json.dumps(
        {"inputs": [{**json_request()["inputs"][0], "shape": [2**40, 1, 2**40, 4, 4]}]}
    ).encode(),
    "shape of words": json.dumps({"inputs": [{**json_request()["inputs"][0], "shape": ["a"] * 5}]}).encode(),
    "many axes": json.dumps({"inputs": [{**json_request()["inputs"][0], "shape": [1] * 5000}]}).encode(),
    "wrong channels": json.dumps(json_request((1, 3, 4, 4, 4))).encode(),
    "not a multiple": json.dumps(json_request((1, 1, 3, 4, 4))).encode(),
    "wrong dtype": json.dumps(json_request(datatype="INT64")).encode(),
    "wrong name": json.dumps(json_request(name="picture")).encode(),
    "unknown output": json.dumps({**json_request(), "outputs": [{"name": "secret"}]}).encode(),
    "binary size without binary": json.dumps(json_request(parameters={"binary_data_size": 256})).encode(),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_bad_request_is_refused_at_once_and_the_service_goes_on(client, body):
    started = time.monotonic()
    answer = client.post(INFER, content=body)
    assert answer.status_code in (400, 413)
    assert list(answer.json()) == ["error"]
    assert time.monotonic() - started < 5
    assert client.post(INFER, json=json_request()).status_code == 200


def test_binary_lengths_that_do_not_fit(client):
    body, headers = binary_request()
    length = headers["Inference-Header-Content-Length"]
    for altered, header in [
        (body[:-1], length),
        (body + b"\x00", length),
        (body, str(int(length) - 1)),
        (body, str(len(body) + 1)),
        (body, "-5"),
        (body, "9" * 400),
        (body, "0"),
        (body, "ten"),
    ]:
        answer = client.post(INFER, content=altered, headers={"Inference-Header-Content-Length": header})
        assert answer.status_code == 400, header[:10]
    nan = body[: int(length)] + np.full(64, np.nan, "<f4").tobytes()
    assert client.post(INFER, content=nan, headers=headers).status_code == 400


def test_compressed_bodies_are_refused(client):
    assert client.post(INFER, content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"}).status_code == 400


def test_large_json_is_refused_in_favour_of_binary(service, client):
    body = b'{"inputs": [' + b" " * (16 * 1024**2) + b"]}"
    answer = client.post(INFER, content=body)
    assert answer.status_code == 413
    assert "binary" in answer.json()["error"]
    # The answer to a small request may be large too.
    body, headers = binary_request((1, 1, 72, 72, 72))
    assert client.post(INFER, content=body, headers=headers).status_code == 413


def test_one_image_may_have_so_many_voxels_and_a_batch_more(models, tmp_path):
    description = read_description(models / "tiny" / "1")
    body = tmp_path / "body"

    def read(shape):
        body.write_text(json.dumps(json_request(shape)))
        return read_request(body, None, description, 10**6, most_voxels=64)

    assert read((3, 1, 4, 4, 4)).tensor.shape == (3, 1, 4, 4, 4)
    with pytest.raises(TooLarge, match="one image of 'image' has 80 values; this service takes 64"):
        read((1, 1, 4, 4, 5))


def test_the_setting_for_one_image_is_obeyed(models, tmp_path):
    with running(local_service(models, tmp_path, limits={"max_tensor_voxels": 64})) as client:
        assert client.post(INFER, json=json_request((2, 1, 4, 4, 4))).status_code == 200
        assert client.post(INFER, json=json_request((1, 1, 4, 4, 8))).status_code == 413


def test_a_promoted_version_takes_over_and_back(models, client):
    for version in ("2", "1"):
        promote(models, version)
        deadline = time.monotonic() + 10
        while client.post(INFER, json=json_request()).headers["X-Model-Version"] != version:
            assert time.monotonic() < deadline
            time.sleep(0.02)
