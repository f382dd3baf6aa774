"""Object storage in this process: as much of Google's JSON API as gcsfs, google-cloud-storage and TensorStore speak.

It is no POSIX file system, and on purpose: objects are whole or absent, there are no folders, and copying, composing
and rewriting, which clients make renames and appends of, are refused and noted in `refused`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

_TIME = "2026-01-01T00:00:00.000Z"
_PAGE = 7  # objects a page of a list: few, so that clients must turn pages


@dataclass
class _Object:
    data: bytes
    generation: int

    def metadata(self, bucket: str, name: str) -> dict[str, Any]:
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{self.generation}",
            "bucket": bucket,
            "name": name,
            "size": str(len(self.data)),
            "generation": str(self.generation),
            "metageneration": "1",
            "etag": f"etag-{self.generation}",
            "md5Hash": base64.b64encode(hashlib.md5(self.data).digest()).decode(),
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "timeCreated": _TIME,
            "updated": _TIME,
        }


@dataclass
class FakeGCS:
    """A server with one bucket, `bucket`. `objects` may be read and changed by a test.

    Fields:
        refused: requests that object storage of the plainest kind cannot serve, as "METHOD path".
        requests: every request, as "METHOD path".
        fail_uploads: how many of the next uploads break off after half of their bytes.
    """

    bucket: str = "bucket"
    objects: dict[str, _Object] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    fail_uploads: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.generations = itertools.count(1)
        self.sessions: dict[str, dict[str, Any]] = {}
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.fake = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What sends gcsfs, google-cloud-storage and TensorStore here, and keeps them from looking for credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCE_METADATA_HOST": "127.0.0.1:1",  # nobody listens there
            "NO_GCE_CHECK": "true",
            "GOOGLE_CLOUD_PROJECT": "test",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",  # TensorStore's
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks over gRPC, which is not spoken here
            "EPATH_USE_TF": "false",  # TensorFlow's own client knows no such variable
        }

    def reset(self) -> FakeGCS:
        with self.lock:
            self.fail_uploads = 0
            for held in (self.objects, self.refused, self.requests, self.sessions):
                held.clear()
        return self

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def put(self, name: str, data: bytes) -> _Object:
        with self.lock:
            self.objects[name] = _Object(data, next(self.generations))
            return self.objects[name]


@functools.cache
def shared() -> FakeGCS:
    """The one server of this process, and of its children: clients remember where they first looked. Empty it with
    `reset`; tests call this before gcsfs is imported."""
    fake = FakeGCS()
    os.environ.update(fake.environment)
    return fake


@pytest.fixture
def gcs(tmp_path, monkeypatch) -> Iterator[FakeGCS]:
    """An empty bucket, gs://bucket, and a cache of this test's own: for files with `pytest_plugins = ["fake_gcs"]`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake = shared().reset()
    yield fake
    assert not fake.refused, "something was renamed, appended to or copied"


class _Refused(Exception):
    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up within an answer when they have what they need."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Tests are quiet."""

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def _serve(self) -> None:
        body = self._body()
        with self.fake.lock:
            self.fake.requests.append(f"{self.command} {self.path}")
        try:
            status, headers, content = self._answer(self.command, self.path, dict(self.headers.items()), body)
        except _Refused as error:
            status, headers = error.status, {"Content-Type": "application/json"}
            content = json.dumps({"error": {"code": status, "message": str(error)}}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(content)

    @property
    def fake(self) -> FakeGCS:
        return self.server.fake  # type: ignore[attr-defined]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, method: str, target: str, headers: dict[str, str], body: bytes):
        url = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in headers.items()}
        if url.path.startswith("/batch/"):
            return self._batch(headers, body)
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", url.path)
        if not found:
            raise self._no(f"{method} {url.path}")
        upload, bucket, name = found[1] == "/upload", urllib.parse.unquote(found[2]), found[3]
        if bucket != self.fake.bucket:
            raise _Refused(404, f"no bucket {bucket}")
        if upload:
            return self._upload(method, query, headers, body)
        if name is None and not url.path.endswith("/o"):
            return _json({"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"})
        if name is None:
            return self._list(query)
        if re.search(r"/(rewriteTo|copyTo|moveTo|compose)\b", name):
            raise self._no(f"{method} {url.path}")
        return self._object(method, urllib.parse.unquote(name), query, headers)

    def _no(self, request: str) -> _Refused:
        self.fake.refused.append(request)
        return _Refused(400, f"{request}: this storage cannot do that")

    def _object(self, method: str, name: str, query: dict[str, str], headers: dict[str, str]):
        with self.fake.lock:
            held = self._require(name, query)
            if held is None:
                raise _Refused(404, f"no object {name}")
            if method == "DELETE":
                del self.fake.objects[name]
                return 204, {}, b""
        if method != "GET":
            raise self._no(f"{method} {name}")
        if query.get("alt") != "media":
            return _json(held.metadata(self.fake.bucket, name))
        data, status = held.data, 200
        answer = {
            "Content-Type": "application/octet-stream",
            "x-goog-generation": str(held.generation),
            "ETag": f'"etag-{held.generation}"',
            "Date": formatdate(usegmt=True),
        }
        if span := re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", "")):
            size = len(data)
            start = int(span[1]) if span[1] else max(size - int(span[2]), 0)
            end = min(int(span[2]) + 1, size) if span[1] and span[2] else size
            if start >= size:
                raise _Refused(416, "range not satisfiable")
            data, status = data[start:end], 206
            answer["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return status, answer, data

    def _require(self, name: str, query: dict[str, str]) -> _Object | None:
        """The object, once the request's conditions hold; a generation of 0 stands for its absence."""
        held = self.fake.objects.get(name)
        generation = held.generation if held else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            raise _Refused(412, "ifGenerationMatch")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            raise _Refused(304 if held else 412, "ifGenerationNotMatch")
        return held

    def _list(self, query: dict[str, str]):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        with self.fake.lock:
            names = sorted(name for name in self.fake.objects if name.startswith(prefix))
            names = [name for name in names if name >= query.get("startOffset", "")]
            if end := query.get("endOffset"):
                names = [name for name in names if name < end]
            entries: dict[str, dict[str, Any] | None] = {}  # in order; None for a common prefix
            for name in names:
                cut = name.find(delimiter, len(prefix)) if delimiter else -1
                if cut >= 0:
                    entries[name[: cut + len(delimiter)]] = None
                else:
                    entries[name] = self.fake.objects[name].metadata(self.fake.bucket, name)
        left = [(name, entry) for name, entry in entries.items() if name > query.get("pageToken", "")]
        size = min(_PAGE, int(query.get("maxResults") or _PAGE))
        page, more = left[:size], len(left) > size
        answer: dict[str, Any] = {"kind": "storage#objects"}
        answer["items"] = [entry for _, entry in page if entry is not None]
        answer["prefixes"] = [name for name, entry in page if entry is None]
        if more:
            answer["nextPageToken"] = page[-1][0]
        return _json(answer)

    def _upload(self, method: str, query: dict[str, str], headers: dict[str, str], body: bytes):
        if "upload_id" in query:
            return self._resume(method, query["upload_id"], headers, body)
        kind = query.get("uploadType")
        if kind == "media":
            return self._store(query["name"], body, query)
        if kind == "multipart":
            boundary = re.search(r"""boundary=['"]?([^'";]+)""", headers["content-type"])
            assert boundary
            _, note, content, _ = re.split(rb"\r?\n?--" + re.escape(boundary[1].encode()) + rb"(?:--)?", body)
            metadata = json.loads(_after_headers(note))
            return self._store(metadata.get("name") or query["name"], _after_headers(content), query)
        if kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            upload_id = f"upload-{next(self.fake.generations)}"
            self.fake.sessions[upload_id] = {"name": name, "query": query, "data": b""}
            location = f"{self.fake.url}{urllib.parse.urlsplit(self.path).path}?upload_id={upload_id}"
            return 200, {"Location": location}, b""
        raise self._no(f"upload {query}")

    def _resume(self, method: str, upload_id: str, headers: dict[str, str], body: bytes):
        session = self.fake.sessions[upload_id]
        if method == "DELETE":
            del self.fake.sessions[upload_id]
            return 499, {}, b""
        span = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", headers.get("content-range", ""))
        if span and span[1] and int(span[1]) != len(session["data"]):
            raise _Refused(400, f"bytes {span[1]} follow {len(session['data'])}")
        session["data"] += body
        if span and (span[3] == "*" or len(session["data"]) < int(span[3])):
            if self.fake.fail_uploads:
                self.fake.fail_uploads -= 1
                raise _Refused(400, "broken off")
            return 308, {"Range": f"bytes=0-{len(session['data']) - 1}"}, b""
        answer = self._store(session["name"], session["data"], session["query"])
        del self.fake.sessions[upload_id]
        return answer

    def _store(self, name: str, data: bytes, query: dict[str, str]):
        with self.fake.lock:
            if self.fake.fail_uploads:
                self.fake.fail_uploads -= 1
                raise _Refused(400, "broken off")
            self._require(name, query)
            return _json(self.fake.put(name, data).metadata(self.fake.bucket, name))

    def _batch(self, headers: dict[str, str], body: bytes):
        """Several requests in one: gcsfs deletes so."""
        boundary = re.search(r"""boundary=['"]?([^'";]+)""", headers["content-type"])
        assert boundary
        answers = []
        for part in body.split(b"--" + boundary[1].encode())[1:-1]:
            line = re.search(rb"(GET|POST|PUT|DELETE) (\S+) HTTP", part)
            assert line
            target = re.sub(r"^https?://[^/]+", "", line[2].decode())
            try:
                status, _, _ = self._answer(line[1].decode(), target, {}, b"")
            except _Refused as error:
                status = error.status
            answers.append(f"--batch\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} x\r\n\r\n")
        content = "".join(answers) + "--batch--\r\n"
        return 200, {"Content-Type": "multipart/mixed; boundary=batch"}, content.encode()


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _after_headers(part: bytes) -> bytes:
    return re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1]
