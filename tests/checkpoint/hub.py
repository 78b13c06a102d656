"""A stand-in for the Hugging Face Hub on this machine: what huggingface_hub asks for, and faults on demand.

Written after the Hub's public HTTP interface: https://huggingface.co/docs/hub/api.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories, {"owner/name": {file's path: bytes}}, under a URL of their own; all have the revisions main and v2.

    Attributes
    ----------
    asked : (method, path, Range header) of every request
    cut : {file's path: bytes after which its next download breaks off}
    """

    def __init__(self, repositories):
        self.repositories, self.asked, self.cut = repositories, [], {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub._answer(self, body=True)

            def do_HEAD(self):
                hub._answer(self, body=False)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def fetched(self):
        """Paths of the files whose contents were asked for."""
        return [path.partition("/resolve/")[2].partition("/")[2] for method, path, _ in self.asked
                if method == "GET" and "/resolve/" in path]  # fmt: skip

    def _answer(self, request, body):
        path = unquote(urlsplit(request.path).path)
        self.asked.append((request.command, path, request.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+)|/tree/([^/]+))?", path):
            self._describe(request, match[1], match[2] or match[3] or "main", tree=match[3] is not None)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send_file(request, *match.groups(), body)
        else:
            self._send(request, 404, b"{}", {"X-Error-Message": f"no such path: {path}"})

    def _files(self, request, repository, revision):
        if repository not in self.repositories:
            self._send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif revision not in ("main", "v2", COMMIT):
            self._send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            return self.repositories[repository]
        return None

    def _describe(self, request, repository, revision, tree):
        files = self._files(request, repository, revision)
        if files is None:
            return
        if tree:
            answer = [
                {"type": "file", "path": name, "size": len(data), "oid": _tag(data)} for name, data in files.items()
            ]
        else:
            names = [{"rfilename": name} for name in files]
            answer = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": names, "private": False}
        self._send(request, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(self, request, repository, revision, name, body):
        files = self._files(request, repository, revision)
        if files is None:
            return
        if name not in files:
            self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        data, start = files[name], 0
        if match := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
            start = int(match[1])
        headers = {"ETag": f'"{_tag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(
            request, 206 if start else 200, data[start:], headers, body, self.cut.pop(name, None) if body else None
        )

    @staticmethod
    def _send(request, status, data, headers, body=True, cut=None):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body and request.command != "HEAD":
            request.wfile.write(data[:cut])
            if cut is not None:
                request.wfile.flush()
                request.close_connection = True
                request.connection.shutdown(2)


def _tag(data):
    return hashlib.sha1(data).hexdigest()
