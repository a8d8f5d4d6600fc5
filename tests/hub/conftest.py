"""A Hub on this machine for each file of tests, and a client that knows no other."""

import pytest
from hub_client import USERS, Client
from hub_server import HubServer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub"), USERS) as server:
        yield server


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    client = Client(server.url, tmp_path_factory.mktemp("client"))
    yield client
    client.close()


@pytest.fixture(autouse=True)
def no_faults(request):
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").faults.clear()
