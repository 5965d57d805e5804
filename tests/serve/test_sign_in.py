"""The sign-in of 3D Slicer's plug-in: closed unless it is switched on, and then no way around a token."""

import pytest
from local_service import local_service, running


@pytest.fixture(scope="module")
def signing(models, tmp_path_factory):
    """A service with the sign-in, and its client without a token."""
    service = local_service(models, tmp_path_factory.mktemp("sign-in"), slicer_sign_in=True)
    with running(service) as client:
        del client.headers["Authorization"]
        yield service, client


def test_it_is_closed_by_default(client):
    for method, path in (("GET", "/auth/"), ("POST", "/auth/token")):
        assert client.request(method, path, headers={"Authorization": ""}).status_code == 401


def test_a_token_is_its_users_password(signing):
    service, client = signing
    assert client.get("/auth/").json() == {"enabled": True}
    form = {"username": "anybody", "password": service.token, "grant_type": "password"}
    answer = client.post("/auth/token", data=form).json()
    assert answer == {"access_token": service.token, "token_type": "bearer"}
    headers = {"Authorization": f"{answer['token_type']} {answer['access_token']}"}
    assert client.get("/v2/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"username=a&password=" + b"x" * 43, 401),
        (b"username=a", 401),
        (b"", 401),
        (b"password=a&password=b", 401),
        (b"\xff\xfe", 400),
        (b"&".join([b"a=b"] * 100), 400),
        (b"password=" + b"x" * 5000, 413),
    ],
)
def test_anything_else_is_refused(signing, body, status):
    _, client = signing
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.post("/auth/token", content=body, headers=headers).status_code == status


def test_no_other_route_is_opened(signing):
    _, client = signing
    for path in ("/v2", "/metrics", "/auth", "/auth/token/valid", "/auth/tokens"):
        assert client.get(path, follow_redirects=False).status_code == 401
