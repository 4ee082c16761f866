"""Silent connections neither stay nor take the place of those who speak: real sockets on a real status port."""

import os
import socket
import time

import httpx
import pytest

from services import connections, status
from services.status import serving_status


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1.0)
    monkeypatch.setattr(status, "MOST_CONNECTIONS", 20)
    monkeypatch.delenv("RLIF_API_TOKEN", raising=False)
    with serving_status("trainer", 0, lambda: {}) as port:
        ends = time.monotonic() + 30
        while True:
            try:
                opened(port).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < ends, "it never listened"
                time.sleep(0.02)
        yield port


def opened(port: int, said: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(said)
    return connection


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def healthy(client, port: int) -> bool:
    return client.get(f"http://127.0.0.1:{port}/healthz", timeout=10).status_code == 200


@pytest.mark.parametrize("said", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_request_that_never_ends_its_headers_is_closed(port, said):
    with opened(port, said) as connection:
        began = time.monotonic()
        assert is_closed(connection)
        assert time.monotonic() - began > 0.5


def test_a_half_sent_second_request_too(port):
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with opened(port, request) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET ")
        while data := connection.recv(4096):
            assert b"HTTP/1.1" not in data


def test_a_connection_that_is_used_stays(port):
    with httpx.Client() as client:
        for _ in range(5):
            assert healthy(client, port)
            time.sleep(0.3)
        assert len(client._transport._pool.connections) == 1


def test_a_flood_of_silent_connections_leaves_files_and_answers(port):
    before = len(os.listdir("/proc/self/fd"))
    flood = [opened(port) for _ in range(200)]
    try:
        with httpx.Client() as client:
            assert all(healthy(client, port) for _ in range(3))
        assert len(os.listdir("/proc/self/fd")) - before - len(flood) <= 25  # the server's ends
    finally:
        for connection in flood:
            connection.close()
