"""A real `mlflow server` that can be killed, frozen and started again, and a proxy before it that can misbehave."""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

START_SECONDS = 90


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """SQLite behind it, artifacts through it; one folder, one port, any number of lives."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store, self.artifacts = folder / "mlflow.db", folder / "artifacts"

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.store}",
            "--artifacts-destination", str(self.artifacts), "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", "1",
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        log = (self.folder / "server.log").open("a")
        self.process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder, env=environment
        )
        until = time.monotonic() + START_SECONDS
        while not self.answers():
            if time.monotonic() > until or self.process.poll() is not None:
                raise RuntimeError((self.folder / "server.log").read_text()[-3000:])
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return answer.status == 200
        except OSError:
            return False

    def signal(self, number: int) -> None:
        """To the server and all its workers."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


class Proxy:
    """Passes requests on, or not, as `mode` says: pass, slow, some_500, or a status that it answers itself."""

    def __init__(self, upstream: Server, port: int | None = None) -> None:
        self.mode: str | int = "pass"
        self.delay = 0.0
        self.random = random.Random(0)
        self.answered: list[int] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, kind, data = outer.answer(self.command, self.path, dict(self.headers), body)
                outer.answered.append(status)
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client has given up

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do

            def log_message(self, *_: object) -> None: ...

        self.upstream = upstream
        self.server = ThreadingHTTPServer(("127.0.0.1", port or 0), Handler)
        self.server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, str, bytes]:
        mode = self.mode
        if isinstance(mode, int):
            return mode, "text/plain", b"made up by the proxy"
        if mode == "some_500" and self.random.random() < 0.3:
            return 500, "text/html", b"<html>made up by the proxy</html>"
        if mode == "slow":
            time.sleep(self.delay)
        link = http.client.HTTPConnection("127.0.0.1", self.upstream.port, timeout=30)
        link.request(method, path, body, {k: v for k, v in headers.items() if k.lower() != "host"})
        found = link.getresponse()
        return found.status, found.getheader("Content-Type") or "text/plain", found.read()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
