"""Redis: URLs, waiting, and an embedded server that is killed and comes back with everything it acknowledged."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from redis.exceptions import ResponseError
from scored_groups import make_groups

from services.queue import GroupQueue
from services.redis import (
    LONGEST_SOCKET_PATH,
    DeadlineExceeded,
    EmbeddedRedis,
    connect,
    connect_sync,
    insist_sync,
    server_binary,
    shown,
    wait_for_redis,
)
from services.startup import StartupError


@pytest.fixture
def own_server(tmp_path):
    """A server that a test may kill."""
    with EmbeddedRedis(tmp_path / "data") as server:
        yield server


def kill(server: EmbeddedRedis) -> None:
    process = server.process
    os.kill(server.pid, signal.SIGKILL)
    process.wait(10)


def test_embedded_server_is_private_durable_and_of_a_short_path(redis_server):
    with connect_sync(redis_server.url) as client:
        settings = client.config_get("append*") | client.config_get("port") | client.config_get("maxmemory-policy")
    assert settings["appendonly"] == "yes" and settings["appendfsync"] == "always"
    assert settings["port"] == "0" and settings["maxmemory-policy"] == "noeviction"
    assert len(str(redis_server.socket_path)) <= LONGEST_SOCKET_PATH
    assert redis_server.socket_path.parent.stat().st_mode & 0o077 == 0
    assert os.path.isabs(redis_server.argv[0])


def test_the_socket_path_depends_on_the_directory_alone(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100) / ("y" * 100)
    assert EmbeddedRedis(deep).url == EmbeddedRedis(deep).url != EmbeddedRedis(tmp_path / "other").url
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    assert len(str(EmbeddedRedis(deep).socket_path)) <= LONGEST_SOCKET_PATH
    with pytest.raises(ValueError, match="at most 100 characters"):
        EmbeddedRedis(tmp_path, socket_path=deep / "redis.sock")


def test_a_second_server_on_the_same_data_is_refused(redis_server):
    with pytest.raises(RuntimeError, match="already serves"):
        EmbeddedRedis(redis_server.directory).start()
    with connect_sync(redis_server.url) as client:
        assert client.ping()


def test_stop_ends_the_process_and_start_brings_the_data_back(tmp_path):
    server = EmbeddedRedis(tmp_path / "data").start()
    pid = server.pid
    with connect_sync(server.url) as client:
        client.set("key", b"\x00\xff")
    server.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.pid
    with EmbeddedRedis(tmp_path / "data") as again, connect_sync(again.url) as client:
        assert client.get("key") == b"\x00\xff"


def test_a_server_that_cannot_start_says_why(tmp_path):
    (tmp_path / "appendonly.aof").write_bytes(b"this is no append-only file")
    with pytest.raises(RuntimeError, match="Bad file format"):
        EmbeddedRedis(tmp_path).start()


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@host",
        "redis://:secret/2@host",
        "redis://:12/secret@host:6379/0",
        "rediss://me:12#secret@host",
        "unix://:12/secret@/run/redis.sock",
        "host:6379",
        "",
        "redis://host/0?socket_timeout=abc",
        "redis://:secret℀@h/0",
    ],
)
def test_a_bad_url_is_refused_without_its_password(url):
    for way in (connect, connect_sync):
        with pytest.raises(ValueError, match="redis url") as caught:
            way(url)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["unix:///run/a@b.sock", "unix://me:secret@/run/a@b.sock", "redis://:12%2Fsecret@host:1/2", "redis://h?db=1"]
)
def test_a_good_url_is_taken(url):
    for way in (connect, connect_sync):
        way(url)


def test_urls_are_shown_without_credentials():
    assert shown("rediss://me:secret@host:7/1?ssl_ca_certs=a") == "rediss://host:7/1"
    assert shown("redis://me:sec/r@t@host:7/1") == "redis://host:7/1"
    assert shown("redis://host:7/1?password=secret") == "redis://host:7/1"
    assert "secret" not in shown("redis://host:7/1?password=se@secret") + shown("redis://me:se?secret@host:7/1")
    assert shown("unix:///tmp/a.sock") == "unix:///tmp/a.sock"


async def test_waiting_for_an_unreachable_redis_has_a_deadline_and_names_it(caplog):
    async with connect("redis://127.0.0.1:1") as client:
        with pytest.raises(DeadlineExceeded, match=r"within 0\.5 s.*127\.0\.0\.1:1"):
            await wait_for_redis(client, 0.5)
    assert "waiting for redis" in caplog.text


async def test_waiting_ends_when_the_server_comes(tmp_path):
    server = EmbeddedRedis(tmp_path)
    async with connect(server.url) as client:
        waiting = asyncio.create_task(wait_for_redis(client, 30))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        with server:
            await waiting
            assert await client.ping()


def test_errors_that_waiting_does_not_mend_propagate_at_once(redis_url):
    with connect_sync(redis_url) as client:
        key = str(uuid.uuid4())
        client.set(key, "text")
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            insist_sync(lambda: client.lpush(key, 1), "push", 60)


async def test_kill_9_under_writers_loses_no_acknowledged_push(own_server):
    """Four writers push 32 KB groups while redis is killed three times; all go on, nothing acknowledged is missing."""
    server, acknowledged = own_server, []
    padding = "x" * 32768
    stop = threading.Event()

    def writer(number: int) -> None:
        async def push() -> None:
            async with connect(server.url) as client:
                queue = GroupQueue(client, "kill", patience_seconds=60)
                for group in make_groups(400, seed=number, run=f"kill-{number}"):
                    if stop.is_set():
                        return
                    group.task.prompt = padding
                    await queue.push(group)
                    acknowledged.append(group.group_id)

        asyncio.run(push())

    writers = [asyncio.create_task(asyncio.to_thread(writer, number)) for number in range(4)]
    for _ in range(3):
        before, ends = len(acknowledged), time.monotonic() + 60
        while len(acknowledged) < before + 25 and time.monotonic() < ends:
            await asyncio.sleep(0.005)
        assert len(acknowledged) >= before + 25, "the writers did not go on after the restart"
        await asyncio.to_thread(kill, server)
        known = list(acknowledged)
        await asyncio.to_thread(server.start)
        async with connect(server.url) as client:
            assert set(known) <= await GroupQueue(client, "kill").seen()
    stop.set()
    await asyncio.gather(*writers)
    async with connect(server.url) as client:
        queue = GroupQueue(client, "kill")
        pulled = [entry.group.group_id for entry in await queue.pull(len(acknowledged), 60)]
        assert len(pulled) == len(set(pulled)) and set(pulled) == set(acknowledged) == await queue.seen()
        assert (await queue.depth()).queued == 0


async def test_a_pull_outlasts_a_restart_of_redis(own_server):
    async with connect(own_server.url) as client, connect(own_server.url) as other:
        queue, pusher = GroupQueue(client, "pull"), GroupQueue(other, "pull")
        groups = make_groups(4)
        await pusher.push(groups[0])
        pulling = asyncio.create_task(queue.pull(4, 60))
        await asyncio.sleep(0.1)
        kill(own_server)
        await asyncio.sleep(0.3)
        own_server.start()
        for group in groups[1:]:
            await pusher.push(group)
        assert [entry.group.group_id for entry in await pulling] == [group.group_id for group in groups]


def test_the_server_ends_with_the_process_that_started_it(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from services.redis import EmbeddedRedis\n"
        "print(EmbeddedRedis(Path(sys.argv[1])).start().pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait(10)
    ends = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z":
        assert time.monotonic() < ends, "the orphaned redis-server lives on"
        time.sleep(0.02)


async def test_a_wrong_password_is_refused_at_once_at_start_up(tmp_path):
    with EmbeddedRedis(tmp_path) as server:
        with connect_sync(server.url) as admin:
            admin.config_set("requirepass", "secret-word")
        for url in (server.url, f"{server.url}?password=wrong-word"):
            client = connect(url)
            with pytest.raises(StartupError, match="redis refuses the login") as caught:
                await wait_for_redis(client, 30)
            assert "-word" not in str(caught.value)
            await client.aclose()
        client = connect(f"{server.url}?password=secret-word")
        await wait_for_redis(client, 30)
        await client.aclose()


def test_the_newest_redis_server_is_taken(tmp_path, monkeypatch):
    def pretended(folder: str, version: str) -> str:
        binary = tmp_path / folder / "redis-server"
        binary.parent.mkdir()
        binary.write_text(f"#!/bin/sh\necho Redis server v={version} sha=00000000:0 malloc=libc bits=64\n")
        binary.chmod(0o755)
        return str(binary)

    old, new = pretended("old", "5.0.14"), pretended("new", "99.10.0")
    monkeypatch.setenv("PATH", f"{tmp_path}/old:{tmp_path}/none:{tmp_path}/new:{os.environ['PATH']}")
    assert server_binary() == new
    monkeypatch.setenv("PATH", f"{tmp_path}/old:{os.environ['PATH']}")
    assert server_binary() != old


def test_a_missing_file_of_certificates_is_a_refusal(tmp_path):
    with pytest.raises(StartupError, match="ssl_ca_certs: .*gone.pem is no file"):
        connect(f"rediss://host:7/0?ssl_ca_certs={tmp_path}/gone.pem")
