"""A Hugging Face hub on this machine: as much of its protocol as huggingface_hub uploads by, and what arrived."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class UploadHub:
    """Repositories in memory. `files[repo][path]`: bytes; `refuse`: status of every answer, if not 0."""

    def __init__(self):
        self.files, self.commits, self.refuse, self.tokens = {}, [], 0, set()
        self._blobs = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def post(self, path, body):
        """-> (status, JSON)"""
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            known = repo in self.files
            self.files.setdefault(repo, {})
            return (409 if known else 200), {"url": f"{self.url}/{repo}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            return 200, {"files": [self._way(f["path"]) for f in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            put = [{**o, "actions": {"upload": {"href": f"{self.url}/put/{o['oid']}"}}} for o in objects]
            return 200, {"transfer": "basic", "objects": put}
        if "/commit/" in path:
            repo = "/".join(path.split("/")[3:5])
            rows = [json.loads(line) for line in body.splitlines()]
            for value in (row["value"] for row in rows if row["key"] == "file"):
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            for value in (row["value"] for row in rows if row["key"] == "lfsFile"):
                self.files[repo][value["path"]] = self._blobs[value["oid"]]
            self.commits.append(rows[0]["value"]["summary"])
            return 200, {"success": True, "commitOid": "a" * 40, "commitUrl": f"{self.url}/{repo}/commit/{'a' * 40}"}
        return 404, {"error": f"{path} is nothing this hub knows"}

    def put(self, path, body):
        oid = path.rsplit("/", 1)[1]
        assert hashlib.sha256(body).hexdigest() == oid
        self._blobs[oid] = body

    @staticmethod
    def _way(path):
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self, status, found):
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.tokens.add(self.headers.get("Authorization"))
                self.answer(*((hub.refuse, {"error": "refused"}) if hub.refuse else hub.post(self.path, body)))

            def do_PUT(self):
                hub.put(self.path, self.rfile.read(int(self.headers["Content-Length"])))
                self.answer(200, {})

            def do_GET(self):
                self.answer(hub.refuse or 404, {"error": "nothing to read here"})

        return Handler
