"""A local S3 for tests: moto as a process of its own, and a proxy in front of it that fails as it is told."""

from __future__ import annotations

import http.client
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REGION = "eu-central-1"  # not the default of any client


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def moto_server() -> Iterator[str]:
    """Address of an empty S3; the process ends with the block."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/moto-api/", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, "the S3 server ended before it answered"
                assert time.monotonic() < until, "the S3 server does not answer"
                time.sleep(0.05)
        yield address
    finally:
        process.kill()
        process.wait()


def upload(address: str, bucket: str, folder: Path, prefix: str, *, public: bool = False) -> None:
    """All files of a folder to s3://bucket/prefix, in a new bucket that everyone may read if `public`."""
    import boto3

    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    client: Any = boto3.client("s3", endpoint_url=address, region_name=REGION, **keys)
    acl = "public-read" if public else "private"
    client.create_bucket(Bucket=bucket, ACL=acl, CreateBucketConfiguration={"LocationConstraint": REGION})
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        client.put_object(Bucket=bucket, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes(), ACL=acl)


class FaultyProxy:
    """Passes requests on, but answers the next of them with the faults in `faults`, one each.

    A fault is (status, S3 error code), or "reset" for a connection that breaks.
    """

    def __init__(self, target: str) -> None:
        self.faults: list[tuple[int, str] | str] = []
        self.always: tuple[int, str] | str | None = None  # answers every request
        self.delay = 0.0  # seconds before each answer
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._target = target.removeprefix("http://")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None: ...

            def do_GET(self) -> None:
                with proxy._lock:
                    proxy.in_flight += 1
                    proxy.most_in_flight = max(proxy.most_in_flight, proxy.in_flight)
                    fault = proxy.always or (proxy.faults.pop(0) if proxy.faults else None)
                try:
                    time.sleep(proxy.delay)
                    if fault == "reset":
                        linger = struct.pack("ii", 1, 0)  # close answers with RST
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                        self.connection.shutdown(socket.SHUT_RD)
                        self.close_connection = True
                    elif fault:
                        body = f"<Error><Code>{fault[1]}</Code><Message>told to</Message></Error>".encode()
                        self._answer(int(fault[0]), {"Content-Type": "application/xml"}, body)
                    else:
                        self._pass_on()
                finally:
                    with proxy._lock:
                        proxy.in_flight -= 1

            do_HEAD = do_GET

            def _pass_on(self) -> None:
                upstream = http.client.HTTPConnection(proxy._target, timeout=30)
                upstream.request(self.command, self.path, headers=dict(self.headers))
                answer = upstream.getresponse()
                body = answer.read()
                skip = ("connection", "transfer-encoding", "date", "server")
                headers = {k: v for k, v in answer.getheaders() if k.lower() not in skip}
                upstream.close()
                self._answer(answer.status, headers, body)

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def heal(self) -> None:
        self.faults, self.always, self.most_in_flight, self.delay = [], None, 0, 0.0

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
