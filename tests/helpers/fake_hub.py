"""A Hugging Face hub of one process, in memory: as much of its HTTP interface as uploads and from_pretrained use."""

import base64
import hashlib
import json
import threading
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


def commit_of(files):
    """Another hash after another upload: what is downloaded is kept by it."""
    return hashlib.sha1(b"".join(name.encode() + content for name, content in sorted(files.items()))).hexdigest()


@contextmanager
def fake_hub(token):
    """Gives (the environment that leads huggingface_hub there, {"models/OWNER/NAME": {path: bytes}}, {the same:
    "private", "public" or None, as was asked for})."""
    repositories, visibility = defaultdict(dict), {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, body=b"", status=200, **headers):
            if not isinstance(body, bytes):
                body = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {token}":
                return self.answer({"error": "Invalid username or password."}, 401)
            path = urlsplit(self.path).path.split("/")[2:]
            if path == ["validate-yaml"]:
                return self.answer({"errors": [], "warnings": []})
            if path == ["repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                repository = f"{asked.get('type', 'model')}s/{name}"
                repositories[repository]
                private = {True: "private", False: "public", None: None}[asked.get("private")]  # of earlier releases
                visibility[repository] = asked.get("visibility", private)
                return self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name})
            files = repositories["/".join(path[:3])]
            if path[3] == "preupload":
                asked = json.loads(body)["files"]
                regular = {"uploadMode": "regular", "shouldIgnore": False}
                return self.answer({"files": [{"path": file["path"]} | regular for file in asked]})
            for line in map(json.loads, body.splitlines()):  # a commit
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = commit_of(files)
            address = f"http://{self.headers['Host']}/{path[1]}/{path[2]}/commit/{commit}"
            return self.answer({"commitUrl": address, "commitOid": commit, "success": True})

        def do_GET(self):
            path = unquote(urlsplit(self.path).path).strip("/").split("/")
            if path[0] == "api":
                files = repositories.get("/".join(path[1:4]))
                if files is None:
                    return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                if len(path) > 4 and path[4] == "tree":
                    return self.answer([
                        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for name, content in files.items()
                    ])  # fmt: skip
                siblings = [{"rfilename": name} for name in files]
                about = {"id": "/".join(path[2:4]), "sha": commit_of(files), "siblings": siblings, "tags": []}
                return self.answer(about)
            kind, path = ("datasets", path[1:]) if path[0] == "datasets" else ("models", path)
            files = repositories.get(f"{kind}/{path[0]}/{path[1]}", {})
            body = files.get("/".join(path[4:]))
            if body is None:
                return self.answer(status=404, X_Error_Code="EntryNotFound")
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self.answer(body, ETag=etag, X_Repo_Commit=commit_of(files))

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": token}, repositories, visibility
    finally:
        server.shutdown()
        server.server_close()
