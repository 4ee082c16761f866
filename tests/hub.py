"""A Hugging Face hub on this machine: the few calls by which `huggingface_hub` makes and fills a repository."""

import base64
import hashlib
import json
from dataclasses import dataclass, field

from fastapi import FastAPI, HTTPException, Request, Response


@dataclass
class Hub:
    token: str
    private: dict[str, bool] = field(default_factory=dict)
    """By repository."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def known(request: Request, call_next):
            if request.headers.get("authorization") != f"Bearer {self.token}" and "/blobs/" not in request.url.path:
                return Response('{"error": "Invalid username or password."}', 401)
            return await call_next(request)

        @app.post("/api/repos/create")
        async def create(request: Request):
            asked = await request.json()
            name = asked["name"] if not asked.get("organization") else f"{asked['organization']}/{asked['name']}"
            private = asked.get("private") or asked.get("visibility") == "private"
            if name in self.private:
                return Response(json.dumps({"url": f"{request.base_url}{name}"}), 409)
            self.private[name], self.files[name] = bool(private), {}
            return {"url": f"{request.base_url}{name}"}

        @app.post("/api/validate-yaml")
        async def validate(request: Request):
            content = (await request.json())["content"]
            return {"errors": [] if content.startswith("---") else [{"message": "no header"}], "warnings": []}

        @app.post("/api/models/{owner}/{name}/preupload/{revision}")
        async def preupload(owner: str, name: str, revision: str, request: Request):
            self._known(f"{owner}/{name}", revision)
            asked = (await request.json())["files"]
            modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in asked]
            return {
                "files": [
                    {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                    for file, mode in zip(asked, modes, strict=True)
                ]
            }

        @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
        async def batch(owner: str, name: str, request: Request):
            self._known(f"{owner}/{name}", "main")
            objects = (await request.json())["objects"]
            actions = [{"upload": {"href": f"{request.base_url}blobs/{thing['oid']}"}} for thing in objects]
            answers = [{**thing, "actions": action} for thing, action in zip(objects, actions, strict=True)]
            return Response(
                json.dumps({"transfer": "basic", "objects": answers}), media_type="application/vnd.git-lfs+json"
            )

        @app.put("/blobs/{oid}")
        async def put(oid: str, request: Request):
            content = await request.body()
            if hashlib.sha256(content).hexdigest() != oid:
                raise HTTPException(400, "another content")
            self.blobs[oid] = content

        @app.post("/api/models/{owner}/{name}/commit/{revision}")
        async def commit(owner: str, name: str, revision: str, request: Request):
            files = self._known(f"{owner}/{name}", revision)
            for line in (await request.body()).splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    self.messages.append(value["summary"])
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
            oid = hashlib.sha1(json.dumps(sorted(files)).encode()).hexdigest()
            url = f"{request.base_url}{owner}/{name}/commit/{oid}"
            return {"success": True, "commitOid": oid, "commitUrl": url}

        return app

    def _known(self, repository: str, revision: str) -> dict[str, bytes]:
        if repository not in self.files or revision != "main":
            raise HTTPException(404, "no such repository")
        return self.files[repository]
