"""A stand-in for the Hugging Face hub: the part of its HTTP interface that pushing uses."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OWNER, TOKEN, READ_ONLY = "me", "hf_writewritewrite", "hf_readreadread"


class Hub:
    """Repositories in memory. `broken` maps a part of a path to what is answered there: a status,
    or "hang up". It may be a function that is called first, such as one that kills the client."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}  # by repository, such as models/me/name
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.broken: dict[str, int | str | Callable[[], None]] = {}
        self.blobs: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            """Answers for this hub."""

            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def create(self, name: str, **files: bytes) -> None:
        """Make a repository, such as models/me/name, that exists already."""
        self.files[name], self.private[name] = files, False

    def close(self) -> None:
        """Stop answering: connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *words):
        """Nothing: the state keeps what was asked."""

    def do_GET(self):
        self._answer("GET")

    def do_HEAD(self):
        self._answer("HEAD")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, state = self.path.partition("?")[0], self.state
        state.asked.append(f"{method} {path}")
        for part, problem in state.broken.items():
            if part in path:
                if callable(problem):
                    problem()
                elif problem == "hang up":
                    self.close_connection = True
                    self.connection.close()
                    return
                else:
                    token = self.headers.get("Authorization")
                    if problem == 200:  # of a proxy that wants a password
                        self._send(200, f"<html>\n{token}".encode())
                        return
                    self._send(problem, {"error": f"broken on purpose\n\x1b[31m {token}"})
                    return
        if path.startswith("/lfs/"):  # the address alone gives the right, as with S3
            state.blobs[path.removeprefix("/lfs/")] = body
            self._send(200, {})
            return
        user = {f"Bearer {TOKEN}": "write", f"Bearer {READ_ONLY}": "read"}.get(
            self.headers.get("Authorization")
        )
        is_public = state.private.get(self._split(path)[0]) is False
        if user is None and method == "GET" and is_public:
            self._route(method, path, body, can_write=False)
        elif user is None:
            headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._send(401, {"error": "Invalid credentials"}, headers)
        else:
            self._route(method, path, body, can_write=user == "write")

    def _route(self, method: str, path: str, body: bytes, *, can_write: bool) -> None:
        state = self.state
        if path == "/api/whoami-v2":
            auth = {"accessToken": {"role": "write" if can_write else "read"}}
            return self._send(200, {"type": "user", "name": OWNER, "auth": auth})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body), can_write=can_write)
        if "/resolve/main/" in path:
            return self._file(*path.strip("/").split("/resolve/main/"), method)
        name, action = self._split(path)
        if name not in state.files:
            return self._send(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        if action == "":
            facts = {"id": name.partition("/")[2], "sha": "0" * 40}
            facts["private"] = state.private[name]
            facts["siblings"] = [{"rfilename": file} for file in state.files[name]]
            return self._send(200, facts)
        if action == "tree/main":
            files = [{"type": "file", "path": f, "oid": "0", "size": 1} for f in state.files[name]]
            return self._send(200, files)
        if not can_write:
            return self._send(403, {"error": "Forbidden"}, {"X-Error-Message": "no write access"})
        if action == "auth-check/write":
            return self._send(200, {})
        if action == "preupload/main":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        if action == "info/lfs/objects/batch":
            objects = [
                item | {"actions": {"upload": {"href": f"{state.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": objects})
        assert action == "commit/main", path
        return self._commit(name, body)

    def _split(self, path: str) -> tuple[str, str]:
        """A repository, such as models/me/name, and what is asked of it."""
        words = path.strip("/").split("/")
        if words[0] == "api":
            words = words[1:]
        elif words[0] != "datasets":
            words = ["models", *words]
        name, action = "/".join(words[:3]), "/".join(words[3:])
        return name.removesuffix(".git"), action

    def _create(self, asked: dict, *, can_write: bool) -> None:
        kind, owner = asked.get("type", "model") + "s", asked["organization"] or OWNER
        name = f"{kind}/{owner}/{asked['name']}"
        url = {"url": f"{self.state.url}/{name.removeprefix('models/')}"}
        if not can_write or owner != OWNER:
            message = {"X-Error-Message": f"You may not create in {owner}"}
            return self._send(403, {"error": "Forbidden"}, message)
        if name in self.state.files:
            return self._send(409, url | {"error": "You already created this repo"})
        self.state.create(name, **{".gitattributes": b""})
        self.state.private[name] = asked.get("visibility") == "private" or bool(
            asked.get("private")
        )
        return self._send(200, url)

    def _file(self, name: str, file: str, method: str) -> None:
        files = self.state.files[name if name.startswith("datasets/") else f"models/{name}"]
        if file not in files:
            return self._send(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        data = files[file]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        return self._send(200, data, headers)

    def _commit(self, name: str, body: bytes) -> None:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.state.files[name][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                data = self.state.blobs[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                self.state.files[name][value["path"]] = data
            elif item["key"] == "deletedFile":
                del self.state.files[name][value["path"]]
        url = f"{self.state.url}/{name.removeprefix('models/')}/commit/{'1' * 40}"
        self._send(200, {"commitUrl": url, "commitOid": "1" * 40})

    def _send(self, status: int, body: dict | bytes, headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for key, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
