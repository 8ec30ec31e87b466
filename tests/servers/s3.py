"""An S3 server for tests: moto as a process of its own over HTTP, or whichever server $S3_TEST_URL names.

moto keeps everything in its memory, so `stop` only closes its port and `start` opens it again: to its clients the
server was away and lost nothing. It believes any credentials and any checksum.

    with s3(directory) as server:
        bucket = server.bucket("blobs")     # for processes: server.url, server.environment

With S3_TEST_URL, the credentials and the region are those of the environment, and nothing can be stopped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from deploy.local import free_ports

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_REGION": "us-east-1"}
START_SECONDS = 120
EXTERNAL_URL = os.environ.get("S3_TEST_URL", "")


@contextmanager
def s3(directory: Path) -> Iterator[S3Server]:
    """A server that runs until the block ends; its log goes to `directory`."""
    if EXTERNAL_URL:
        yield S3Server(EXTERNAL_URL, environment={}, process=None)
        return
    (port,) = free_ports(1)
    with (directory / "s3.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        server = S3Server(f"http://127.0.0.1:{port}", environment=CREDENTIALS, process=process)
        server.wait()
        yield server
    finally:
        process.kill()
        process.communicate()


class S3Server:
    def __init__(self, url: str, *, environment: dict[str, str], process: subprocess.Popen[str] | None) -> None:
        self.url = url
        # What processes that use the server need besides its URL.
        self.environment = environment
        self.process = process

    @property
    def can_stop(self) -> bool:
        return self.process is not None

    def client(self) -> Any:
        keys: dict[str, str] = {}
        if self.environment:
            keys["aws_access_key_id"] = self.environment["AWS_ACCESS_KEY_ID"]
            keys["aws_secret_access_key"] = self.environment["AWS_SECRET_ACCESS_KEY"]
            keys["region_name"] = self.environment["AWS_REGION"]
        config = Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return boto3.session.Session(**keys).client("s3", endpoint_url=self.url, config=config)

    def bucket(self, name: str) -> str:
        """Makes a bucket, if this server does not have it from the last time; its name."""
        client = self.client()
        if name not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=name)
        return name

    def stop(self) -> None:
        """Connections are refused from here on; what is stored stays."""
        self._tell("stop")

    def start(self) -> None:
        self._tell("start")
        self.wait()

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.client().list_buckets()
                return
            except (BotoCoreError, ClientError):
                assert self.process is None or self.process.poll() is None, "the S3 server ended; see its log"
                assert time.monotonic() < deadline, f"no S3 server at {self.url}"
                time.sleep(0.05)

    def _tell(self, order: str) -> None:
        assert self.process is not None and self.process.stdin and self.process.stdout
        print(order, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == f"{order}\n"


def _serve(port: int) -> None:
    """The process: opens and closes the port as it is told, and ends with its standard input."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = DomainDispatcherApplication(create_backend_app)

    def opened() -> Any:
        listening = make_server("127.0.0.1", port, app, threaded=True)
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        return listening

    server = opened()
    for line in sys.stdin:
        if line == "stop\n":
            server.shutdown()
            server.server_close()
        else:
            server = opened()
        print(line, end="", flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
