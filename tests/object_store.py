"""A server that speaks S3 on loopback, with its files in a folder, to be killed and started again."""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from services.address import free_port
from services.supervisor import die_with_parent

BUCKET = "weights"
KEY, SECRET = "rlif-tests", "not-so-secret-at-all"


class ObjectStore:
    def __init__(self, folder: Path):
        self.folder, self.port = folder / "objects", free_port()
        self.files = self.folder / BUCKET
        self.files.mkdir(parents=True)
        self.log = folder / "objects.log"
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, deadline_seconds: float = 60) -> "ObjectStore":
        argv = [sys.executable, "-m", "nanio", "serve", "--data-dir", str(self.folder), "--host", "127.0.0.1"]
        env = {**os.environ, "NANIO_ACCESS_KEY": KEY, "NANIO_SECRET_KEY": SECRET}
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*argv, "--port", str(self.port)], env=env, stdout=out, stderr=out, preexec_fn=die_with_parent
            )
        ends = time.monotonic() + deadline_seconds
        while True:
            try:
                httpx.get(self.url, timeout=5)
                return self
            except httpx.TransportError:
                if self.process.poll() is not None or time.monotonic() > ends:
                    raise RuntimeError(f"the object store did not start:\n{self.log.read_text()[-2000:]}") from None
            time.sleep(0.05)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def environment(self, patch: pytest.MonkeyPatch) -> None:
        """What a client needs to find it, and is known by."""
        for name, value in {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
