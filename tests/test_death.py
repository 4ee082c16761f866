"""A server whose engine has died says so for a while, and ends."""

import subprocess
import sys
import time
from pathlib import Path

import httpx

from services.address import free_port

SERVER = """
import sys, time
from services import http
from services.access import HttpSettings
http.DEATH_SECONDS = 2.0
began = time.monotonic()
def death():
    return "the engine died" if time.monotonic() - began > 1 else ""
app = http.create_app("x", "1", HttpSettings(), lambda: {"engine": death() or "ok"}, death=death)
http.serve(app, "127.0.0.1", int(sys.argv[1]))
"""


def test_a_server_whose_engine_has_died_says_so_and_ends():
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], cwd=Path(__file__).parent.parent)
    try:
        said = set()
        ends = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < ends:
            try:
                said.add(httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code)
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        assert process.wait(1) == 1
        assert 503 in said
    finally:
        process.kill()
        process.wait(10)
