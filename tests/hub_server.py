"""A stand-in for the Hugging Face hub on loopback, and to produce faults.

It answers only the requests that `datasets` and `huggingface_hub` make to find and read a data set.
"""

import functools
import hashlib
import json
import socket
import struct
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

PAGE = 1000  # entries of a folder in one answer, and paths that one request may ask about
REVISION = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves one data set, `org/corpus`, from a dictionary of paths and contents."""

    repo = "org/corpus"

    def __init__(self, files: dict[str, bytes], revision: str = REVISION):
        self.files, self.revision = files, revision
        self.sizes: dict[str, int] = {}  # of files whose content is not here
        self.listings: dict[tuple, list[dict]] = {}  # of the folders asked for
        self.gate = 0  # the status with which it refuses the files (401 or 403); 0: it gives them
        self.main = revision  # the newest revision; only `revision` can be read
        self.faults: deque[str | None] = deque()  # each request for bytes of a file takes one
        self.api_faults: deque[str | None] = deque()  # each other request takes one
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range
        self.tokens: set[str | None] = set()  # Authorization headers received
        self.encodings: set[str | None] = set()  # Accept-Encoding headers of requests for a range
        self.stall_seconds = 60.0
        self.signature = 0  # in the address of a large file; an older one is refused
        self.cdn_tokens: set[str | None] = set()  # Authorization headers that came with those
        handler = type("Handler", (HubHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@functools.lru_cache(1000)  # it took more time than to send the bytes
def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def missing(self, code: str, status: int = 404) -> None:
        self.answer(status, X_Error_Code=code, X_Error_Message=code)

    def fault(self, kind: str | None, body: bytes = b"") -> bool:
        """Cause a fault; return whether it replaces the answer."""
        if kind is None:
            return False
        if kind.isdigit():
            self.answer(int(kind), b"no")
            return True
        if kind == "reset":  # the connection ends before any answer
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif kind == "drop" or kind == "stall":  # it ends or stops in the middle of the body
            self.send_response(206)
            self.send_header("Content-Length", str(len(body) or 100))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if kind == "stall":
                time.sleep(self.hub.stall_seconds)
        elif kind == "truncate":  # a complete answer that holds half of the bytes
            self.answer(206, body[: len(body) // 2])
            return True
        elif kind == "elsewhere":  # as many bytes from another place
            place = f"bytes 1-{len(body)}/{len(body) + 1}"
            self.answer(206, b"x" * len(body), Content_Range=place)
            return True
        self.close_connection = True
        self.connection.close()
        return True

    def file_info(self, path: str) -> dict:
        size = self.hub.sizes.get(path) or len(self.hub.files[path])
        oid = hashlib.sha1(path.encode()).hexdigest()
        return {"type": "file", "path": path, "size": size, "oid": oid}

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        form = self.rfile.read(length)
        self.hub.requests.append((self.command, self.path, ""))
        self.api(form)

    def do_GET(self) -> None:
        self.hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
        self.hub.tokens.add(self.headers.get("Authorization"))
        if "Range" in self.headers:
            self.hub.encodings.add(self.headers.get("Accept-Encoding"))
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/datasets/{self.hub.repo}/resolve/"):
            revision, _, name = path.split("/resolve/")[1].partition("/")
            self.resolve(revision, name)
        elif path.startswith("/cdn/"):
            self.hub.cdn_tokens.add(self.headers.get("Authorization"))
            signature, _, name = path.removeprefix("/cdn/").partition("/")
            if int(signature) < self.hub.signature:
                self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
            else:
                self.content(name)
        else:
            self.api(b"")

    do_HEAD = do_GET  # noqa: N815

    def api(self, form: bytes) -> None:
        if self.fault(self.hub.api_faults.popleft() if self.hub.api_faults else None):
            return
        path = unquote(urlsplit(self.path).path)
        root = f"/api/datasets/{self.hub.repo}"
        if path in (root, f"{root}/revision/main", f"{root}/revision/{self.hub.revision}"):
            sha = self.hub.revision if self.hub.revision in path else self.hub.main
            siblings = [{"rfilename": name} for name in self.hub.files]
            self.answer_json({"id": self.hub.repo, "sha": sha, "siblings": siblings})
        elif path == "/api/datasets/corpus":  # an old name without an owner
            self.answer(307, Location=f"{self.hub.url}{root}")
        elif path.startswith(f"{root}/tree/{self.hub.revision}"):
            folder = path.removeprefix(f"{root}/tree/{self.hub.revision}").strip("/")
            self.tree(folder, "recursive=True" in self.path or "recursive=true" in self.path)
        elif path == f"{root}/paths-info/{self.hub.revision}":
            is_json = form.startswith(b"{")
            wanted = (json.loads(form) if is_json else parse_qs(form.decode()))["paths"]
            if len(wanted) > PAGE:  # the real hub's answer
                error = json.dumps({"error": "too many parameters"}).encode()
                return self.answer(413, error, Content_Type="application/json")
            self.answer_json([self.file_info(name) for name in wanted if name in self.names])
        elif path.startswith(root):
            self.missing("RevisionNotFound")
        else:
            self.missing("RepoNotFound")

    @property
    def names(self) -> list[str]:
        return [*self.hub.files, *self.hub.sizes]

    def entries(self, folder: str, recursive: bool) -> list[dict]:
        """What is in a folder, sorted by path. It is kept: an answer holds only a part of it."""
        key = self.hub.revision, folder, recursive
        if key not in self.hub.listings:
            prefix = folder + "/" if folder else ""
            found = {}
            for name in filter(lambda name: name.startswith(prefix), self.names):
                parts = name.removeprefix(prefix).split("/")
                for i in range(1, len(parts) if recursive else min(2, len(parts))):
                    path = prefix + "/".join(parts[:i])
                    found[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
                if recursive or len(parts) == 1:
                    found[name] = self.file_info(name)
            self.hub.listings[key] = [found[path] for path in sorted(found)]
        return self.hub.listings[key]

    def tree(self, folder: str, recursive: bool) -> None:
        """List a folder, 1,000 entries in an answer, and in its header the address of the next."""
        found = self.entries(folder, recursive)
        if not found:
            return self.missing("EntryNotFound")
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        start = int(query.get("cursor", 0))
        query["cursor"] = str(start + PAGE)
        address = f"{self.hub.url}{url.path}?{urlencode(query)}"
        more = {"Link": f'<{address}>; rel="next"'} if len(found) > start + PAGE else {}
        page = json.dumps(found[start : start + PAGE]).encode()
        self.answer(200, page, Content_Type="application/json", **more)

    def resolve(self, revision: str, name: str) -> None:
        if revision not in (self.hub.revision, "main"):
            return self.missing("RevisionNotFound")
        small = not name.endswith((".parquet", ".gz", ".jsonl", ".zst"))
        if small and self.fault(self.hub.api_faults.popleft() if self.hub.api_faults else None):
            return None
        if self.hub.gate:
            return self.missing("GatedRepo", self.hub.gate)
        if name not in self.hub.files:
            return self.missing("EntryNotFound")
        data = self.hub.files[name]
        headers = {"ETag": f'"{etag(data)}"', "X_Repo_Commit": revision}
        if small:
            return self.answer(200, data, **headers)
        # the real hub too sends clients to another server for large files
        headers |= {"X_Linked_Size": str(len(data)), "X_Linked_ETag": headers["ETag"]}
        server = self.hub.url.replace("127.0.0.1", "localhost")
        location = f"{server}/cdn/{self.hub.signature}/{name}"
        return self.answer(302, Location=location, **headers)

    def content(self, name: str) -> None:
        data = self.hub.files[name]
        header = self.headers.get("Range", "")
        begin, stop = 0, len(data)
        if header:
            first, _, last = header.removeprefix("bytes=").partition("-")
            begin, stop = int(first), int(last) + 1 if last else len(data)
        body = data[begin:stop]
        if self.fault(self.hub.faults.popleft() if self.hub.faults else None, body):
            return
        span = f"bytes {begin}-{stop - 1}/{len(data)}"
        self.answer(206 if header else 200, body, Content_Range=span, Accept_Ranges="bytes")
