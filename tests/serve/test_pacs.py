"""A PACS is one of the configured ones, is not followed elsewhere, and its refusal is said."""

from __future__ import annotations

import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pydicom
import pytest
from dicom_builder import DicomBuilder
from pydantic import ValidationError

from medfl_ray.errors import ConfigError
from serve.clinic.pacs import PacsFailed, choose_pacs, store_in_pacs
from serve.clinic.pacs_target import PacsTarget
from serve.refusals import NotServed


class _Pacs(BaseHTTPRequestHandler):
    status, headers_out, seen = 200, {}, []

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        type(self).seen.append((self.path, self.headers.get("Authorization"), self.rfile.read(length)))
        self.send_response(self.status)
        for name, value in self.headers_out.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        self.do_POST()

    def log_message(self, *words):
        pass


@pytest.fixture
def pacs():
    handler = type("Handler", (_Pacs,), {"seen": [], "status": 200, "headers_out": {}})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}/dicom-web"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def raw():
    buffer = io.BytesIO()
    DicomBuilder().slices[0].save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_redirect_is_not_followed(pacs, raw, status):
    handler, url = pacs
    handler.status, handler.headers_out = status, {"Location": f"{url}/elsewhere"}
    with pytest.raises(PacsFailed, match="did not take the result"):
        store_in_pacs(PacsTarget(name="archive", url=url), raw)
    assert [path for path, _, _ in handler.seen] == ["/dicom-web/studies"]


@pytest.mark.parametrize("status", [400, 401, 500, 503])
def test_a_refusal_is_said(pacs, raw, status):
    handler, url = pacs
    handler.status = status
    with pytest.raises(PacsFailed, match=f"'archive'.*{status}"):
        store_in_pacs(PacsTarget(name="archive", url=url, timeout_s=5), raw)


def test_a_pacs_that_is_not_there(raw):
    with pytest.raises(PacsFailed, match="did not take"):
        store_in_pacs(PacsTarget(name="archive", url="http://127.0.0.1:9/x", timeout_s=1), raw)


def test_secrets_come_from_the_environment(pacs, raw, monkeypatch):
    handler, url = pacs
    handler.status = 500
    target = PacsTarget(name="archive", url=url, token_env="MEDFL_TEST_PACS_TOKEN", timeout_s=5)
    with pytest.raises(ConfigError, match="MEDFL_TEST_PACS_TOKEN"):
        store_in_pacs(target, raw)
    monkeypatch.setenv("MEDFL_TEST_PACS_TOKEN", "secret")
    with pytest.raises(PacsFailed) as refused:
        store_in_pacs(target, raw)
    assert handler.seen[0][1] == "Bearer secret"
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["ftp://x", "http://name:word@host/", "file:///etc/passwd", "host"])
def test_addresses_are_plain(url):
    with pytest.raises(ValidationError):
        PacsTarget(name="archive", url=url)


def test_only_configured_names_are_known():
    targets = {"archive": PacsTarget(name="archive", url="http://127.0.0.1:1/")}
    assert choose_pacs(None, targets) is None
    assert choose_pacs("archive", targets) is targets["archive"]
    with pytest.raises(NotServed, match="archive"):
        choose_pacs("other", targets)


def test_the_object_arrives_whole(pacs, raw):
    handler, url = pacs
    handler.status = 500
    with pytest.raises(PacsFailed):
        store_in_pacs(PacsTarget(name="archive", url=url, timeout_s=5), raw)
    body = handler.seen[0][2]
    sent = pydicom.dcmread(io.BytesIO(body[body.index(b"\r\n\r\n") + 4 :]))
    assert sent.SOPInstanceUID == pydicom.dcmread(io.BytesIO(raw)).SOPInstanceUID
