"""Services on this machine are reached directly, whatever proxies the environment names."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import requests

from pipeline.cluster.loopback import bypass_proxies


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"here")

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_service_here_answers_behind_a_proxy(monkeypatch, host):
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    url = f"http://{host}:{server.server_port}/"
    try:
        with pytest.raises(requests.exceptions.ProxyError):
            requests.get(url, timeout=5)
        bypass_proxies()
        assert requests.get(url, timeout=5).text == "here"
    finally:
        server.shutdown()
        server.server_close()


def test_what_the_user_excluded_stays_excluded():
    environment = {"NO_PROXY": "internal.org, 10.0.0.1", "no_proxy": "other.org"}
    bypass_proxies(environment)
    bypass_proxies(environment)
    assert environment["NO_PROXY"] == "internal.org,10.0.0.1,other.org,127.0.0.1,localhost,::1"
    assert environment["no_proxy"] == environment["NO_PROXY"]
