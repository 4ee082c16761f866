"""`rlif console`: where it serves is printed, and a redis that is no help is refused."""

import subprocess
import sys

import httpx
import pytest

from services.address import listen
from services.cli.main import main


def refused(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["rlif", "console", "--run", "math", *arguments])
    monkeypatch.setattr("services.logs.configure", lambda *_, **__: None)  # it would take over this process's logging
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_the_address_is_printed(redis_url):
    command = [sys.executable, "-m", "services.cli.main", "console", "--run", "x", "--redis", redis_url, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        word, url = process.stdout.readline().split()
        assert word == "console" and "nothing is known of this run yet" in httpx.get(url, timeout=30).text.lower()
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_a_redis_that_is_not_there_is_refused(monkeypatch, capsys):
    with listen("127.0.0.1", 0) as closed:
        port = closed.getsockname()[1]
    line = refused(monkeypatch, capsys, "--redis", f"redis://:secret@127.0.0.1:{port}")
    assert line.startswith(f"rlif: --redis: no redis answers at redis://127.0.0.1:{port}: ") and "secret" not in line
    # An unquoted / or ? in the password: what stands before it is no port.
    line = refused(monkeypatch, capsys, "--redis", f"redis://:{port}/secret@somehost:6379/0")
    assert line.endswith("percent-encode what is special in the password (a / as %2F)")
    assert str(port) not in line and "secret" not in line
    for after, kind in (("secret", "ConnectionError"), ("secret=1", "TypeError")):
        line = refused(monkeypatch, capsys, "--redis", f"redis://:{port}?{after}@somehost:6379/0")
        assert line == f"rlif: --redis: no redis answers at redis://...: {kind}"
