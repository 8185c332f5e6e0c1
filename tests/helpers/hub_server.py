"""A stand-in for the Hugging Face Hub: the part of its HTTP API with which huggingface_hub reads and writes datasets.

Files of at least `lfs_bytes`, and those of .gitattributes' usual suffixes, are LFS objects, as on the Hub.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml
from aiohttp import web

TOKEN = "hf_" + "t" * 34
READER = "hf_" + "r" * 34  # a token that may not write
_LFS = (".tar", ".parquet", ".sqlite")


@dataclass
class Repo:
    """A dataset: each commit's files, and whether it is private."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    lfs: set[str] = field(default_factory=set)  # names that are LFS objects

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def sha(self) -> str:
        return f"{len(self.commits):040x}"


@dataclass
class HubServer:
    """The server's state. `sent` lists the LFS objects that were uploaded, `fail` how many uploads fail first."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)
    fail_after: int | None = None  # uploads until all others are refused
    lfs_bytes: int = 1 << 20

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._authorized])
        name = "{owner}/{name}"
        app.router.add_get(f"/api/datasets/{name}", self._info)
        app.router.add_get(f"/api/datasets/{name}/revision/{{rev}}", self._info)
        app.router.add_get(f"/api/datasets/{name}/tree/{{rev}}", self._tree)
        app.router.add_post("/api/repos/create", self._create)
        app.router.add_post("/api/validate-yaml", self._validate)
        app.router.add_post(f"/api/datasets/{name}/preupload/{{rev}}", self._preupload)
        app.router.add_post(f"/datasets/{name}.git/info/lfs/objects/batch", self._batch)
        app.router.add_put("/lfs/{oid}", self._put)
        app.router.add_post(f"/api/datasets/{name}/commit/{{rev}}", self._commit)
        app.router.add_get(f"/datasets/{name}/resolve/{{rev}}/{{path:.*}}", self._resolve)
        return app

    @web.middleware
    async def _authorized(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path.startswith("/lfs/"):
            return await handler(request)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READER):
            message = "Invalid credentials in Authorization header"
            return web.json_response({"error": message}, status=401, headers={"X-Error-Message": message})
        if token == READER and request.method == "POST":
            message = "You have read access but not the required permissions for this operation"
            return web.json_response({"error": message}, status=403, headers={"X-Error-Message": message})
        owner, name = request.match_info.get("owner"), request.match_info.get("name")
        if name is not None and f"{owner}/{name}" not in self.repos:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return web.json_response({"error": "Repository not found"}, status=404, headers=headers)
        revision = request.match_info.get("rev", "main")
        if revision != "main" and revision != self._repo(request).sha:
            headers = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}
            return web.json_response({"error": "Invalid rev id"}, status=404, headers=headers)
        return await handler(request)

    def _repo(self, request: web.Request) -> Repo:
        return self.repos[f"{request.match_info['owner']}/{request.match_info['name']}"]

    async def _info(self, request: web.Request) -> web.Response:
        repo = self._repo(request)
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        listed = [{"rfilename": path} for path in repo.files]
        return web.json_response({"id": name, "sha": repo.sha, "private": repo.private, "siblings": listed, "tags": []})

    async def _tree(self, request: web.Request) -> web.Response:
        repo = self._repo(request)
        return web.json_response([self._entry(repo, path, data) for path, data in sorted(repo.files.items())])

    def _entry(self, repo: Repo, path: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_sum(data)}
        if path in repo.lfs:
            sha256 = hashlib.sha256(data).hexdigest()
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
            entry |= {"oid": git_sum(pointer), "lfs": {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}}
        return entry

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = f"{body['organization']}/{body['name']}" if body.get("organization") else f"me/{body['name']}"
        private = body.get("private") or body.get("visibility") == "private"
        self.repos.setdefault(name, Repo(private=bool(private)))
        return web.json_response({"url": f"{self.url}/datasets/{name}", "name": name, "id": name})

    async def _validate(self, request: web.Request) -> web.Response:
        """Check a card's header, as far as the Hub's rules matter here."""
        body = await request.json()
        header = yaml.safe_load(body["content"].split("---")[1])
        errors = [] if isinstance(header["size_categories"], list) else [{"message": "size_categories"}]
        return web.json_response({"errors": errors, "warnings": []}, status=400 if errors else 200)

    async def _preupload(self, request: web.Request) -> web.Response:
        files = (await request.json())["files"]
        modes = []
        for file in files:
            large = file["size"] >= self.lfs_bytes or file["path"].endswith(_LFS)
            modes.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        return web.json_response({"files": modes})

    async def _batch(self, request: web.Request) -> web.Response:
        answers = []
        for wanted in (await request.json())["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                answer["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}?signature=s3cr3t"}}
            answers.append(answer)
        return web.json_response({"transfer": "basic", "objects": answers})

    async def _put(self, request: web.Request) -> web.Response:
        data, oid = await request.read(), request.match_info["oid"]
        if self.fail_after is not None and len(self.sent) >= self.fail_after:
            return web.Response(status=400, text="no more today")
        assert hashlib.sha256(data).hexdigest() == oid
        self.objects[oid] = data
        self.sent.append(oid)
        return web.Response()

    async def _commit(self, request: web.Request) -> web.Response:
        repo = self._repo(request)
        lines = [json.loads(line) for line in (await request.text()).splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != repo.sha:
            return web.json_response({"error": "A commit has happened since"}, status=412)
        files = dict(repo.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                repo.lfs.discard(value["path"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
                repo.lfs.add(value["path"])
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        repo.commits.append(files)
        page = f"{self.url}/datasets/{request.match_info['owner']}/{request.match_info['name']}/commit/{repo.sha}"
        return web.json_response({"commitUrl": page, "commitOid": repo.sha, "success": True})

    async def _resolve(self, request: web.Request) -> web.Response:
        repo, path = self._repo(request), request.match_info["path"]
        if path not in repo.files:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        data = repo.files[path]
        return web.Response(body=data, headers={"ETag": f'"{git_sum(data)}"', "X-Repo-Commit": repo.sha})


def git_sum(data: bytes) -> str:
    """Return git's sum of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Serve an empty Hub on loopback."""
    hub, ready, loop = HubServer(), threading.Event(), asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(hub.app())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        hub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(60)
    yield hub
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)
