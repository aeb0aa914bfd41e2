"""The front: middleware of vLLM's own API server, which makes memories and puts them into requests by id.

It adds `/v1/memories` to vLLM's routes and looks into the bodies of completions and chats; all else is vLLM's.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from compressor.api import Compressor
from compressor.errors import CompressorError, require_texts, require_whole
from compressor.model.checkpoint import compressor_name
from compressor.model.decoder import score
from compressor.model.fidelity import fidelities
from compressor.model.generation import regeneration_limit
from compressor.model.memory import Memory, memory_prefix, signed
from compressor.serving.shelf import Catalogue, Missing, Placed, Shelf
from compressor.storage.codec import Codec
from compressor.storage.memory_file import as_stored
from compressor.storage.store import Store

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# Routes that answer, too, and settings that read a prompt as text, cut it, or replace the template: not with memories.
WITHOUT = ("/v1/responses", "/v1/messages")
UNREADABLE = ("echo", "suffix", "prompt_logprobs", "prompt_embeds", "truncate_prompt_tokens", "chat_template")
CANARIES = ("The committee chose the smaller of two bridges.", "Glass cools slowly in an oven.")


class Refused(CompressorError):
    """A request that cannot be served, and the HTTP status that says so."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Desk:
    """Makes memories, finds them by id, and puts them into requests at the positions of placeholders."""

    def __init__(self, model: Compressor, catalogue: Catalogue, shelf: Shelf, placeholder: int, name: str):
        self.model, self.catalogue, self.shelf, self.placeholder = model, catalogue, shelf, placeholder
        self.name = compressor_name(model, name)
        self.canaries: dict[str, Memory] = {}
        self._work = asyncio.Lock()

    async def alone(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run work in a thread, one piece at a time, so that requests under way go on."""
        async with self._work:
            return await asyncio.to_thread(work, *arguments)

    def create(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Compress `text`, with its settings, unless that memory is there; what `describe` says."""
        if unknown := set(wanted) - {"text", "tokens", "segment_tokens", "refine_steps", "measure"}:
            raise Refused(400, f"{min(unknown)!r} is no setting of a memory: give text, tokens, segment_tokens")
        text, steps = wanted.get("text"), wanted.get("refine_steps") or 0
        tokens, segment_tokens = wanted.get("tokens"), wanted.get("segment_tokens")
        require_texts("text", [text])
        require_whole("refine_steps", steps, 0, 100)
        content = json.dumps([self.name, self.catalogue.codec, tokens, segment_tokens, steps, text])
        name = hashlib.sha256(content.encode()).hexdigest()[:32]
        try:
            return self.describe(name)
        except CompressorError:  # not there, or damaged
            ids = self.model.base.tokenise([str(text)])
        (memory,) = self.model.compress_ids(ids, tokens, segment_tokens=segment_tokens, refine_steps=steps)
        stored = as_stored(memory, Codec.parse(self.catalogue.codec)) if self.catalogue.codec else memory
        fidelity = fidelities(self.model, [stored], ids)[0] if wanted.get("measure", True) else None
        self.catalogue.add(name, replace(signed(memory, self.model.base, self.name), fidelity=fidelity))
        return self.describe(name)

    def describe(self, name: str) -> dict[str, Any]:
        """What `GET /v1/memories/ID` tells."""
        size, memory = self.catalogue.state(name)[0], self.load(name)
        told: dict[str, Any] = {
            "tokens": memory.tokens,
            "passage_tokens": memory.passage_tokens,
            "segments": len(memory.segments),
        }
        told |= {"fidelity": memory.fidelity, "bytes": size, "compressor": memory.compressor}
        return {"id": name, "object": "memory", "ratio": round(memory.passage_tokens / memory.tokens, 3), **told}

    def load(self, name: str, tokens: int | None = None) -> Memory:
        """A memory, or of `ID:N` its N-th segment, from 0 on; cut to `tokens` a segment."""
        name, _, part = name.partition(":")
        memory = self.canaries.get(name) or self.catalogue.load(name)
        if part:
            if not part.isdecimal() or int(part) >= len(memory.segments):
                raise Missing(f"memory {name!r} has {len(memory.segments)} segments, from 0 on; no {part[:9]!r}")
            memory = memory.split()[int(part)]
        return memory if tokens is None else memory.truncate(tokens)

    def take(self, names: Any, tokens: Any = None) -> Placed:
        """Take memories, one after the other in one context, from the shelf."""
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise Refused(400, f"memories = {str(names)[:80]} must be a list of ids, at least one")
        if tokens is not None:
            require_whole("memory_tokens", tokens)
        plain = [name.partition(":")[0] for name in names]
        states = ["" if name in self.canaries else self.catalogue.state(name)[1] for name in plain]

        def load() -> Memory:
            return Memory.concatenate([self.load(name, tokens) for name in names])

        try:
            return self.shelf.take((str(tokens), *names, *states), self.model.base, load)
        except Missing:
            raise
        except CompressorError as error:  # damaged, or what does not fit this server or each other; else a wrong k
            raise Refused(400 if tokens else 422, str(error)) from None

    async def prepare(self, body: dict[str, Any], path: str) -> Placed | None:
        """Turn `memories` of a request to `path` into what the connector reads; None where it names none."""
        names, tokens = body.pop("memories", None), body.pop("memory_tokens", None)
        if (wanted := body.pop("retrieve", None)) is not None:
            if names is not None or not isinstance(wanted, dict) or set(wanted) - {"question", "top"}:
                raise Refused(400, 'retrieve is {"question": TEXT, "top": NUMBER}, and goes without memories')
            names = await self.alone(self.catalogue.search, str(wanted.get("question", "")), wanted.get("top", 1))
            if not names:
                raise Refused(400, "the store has nothing like this question: ask in other words")
        if names is None:
            if tokens is not None or "memory" in (body.get("kv_transfer_params") or ()):
                raise Refused(400, 'name the memories to read: "memories": [ids]')
            return None
        if path in WITHOUT:
            raise Refused(400, f"{path} reads no memories: use {CHAT} or {COMPLETIONS}")
        if wrong := [name for name in UNREADABLE if body.get(name)]:
            raise Refused(400, f"{wrong[0]} cannot be used with memories, whose positions hold no text: leave it out")
        given = body.get("prompt") or ""
        several = isinstance(given, list) and not isinstance(given[0], int)
        prompts = [self._ids(prompt) for prompt in (given if several else [given])]
        placed: Placed = await self.alone(self.take, names, tokens)
        body["kv_transfer_params"] = {"memory": placed.name, "tokens": placed.tokens}
        body["cache_salt"] = ":".join([placed.name, *filter(None, [body.get("cache_salt")])])
        if path == CHAT:
            body["chat_template_kwargs"] = {**(body.get("chat_template_kwargs") or {}), "memory_tokens": placed.tokens}
            body["add_special_tokens"] = False
        else:
            prompts = [[self.placeholder] * placed.tokens + prompt for prompt in prompts]
            body["prompt"] = prompts if several else prompts[0]
            if not given:
                body.setdefault("max_tokens", regeneration_limit(placed.passage_tokens))
        return placed

    def _ids(self, prompt: Any) -> list[int]:
        """Token ids of what follows a memory; without anything BOS, which asks for the passage again."""
        ids = self.model.base.tokenise([prompt])[0] if isinstance(prompt, str) else prompt
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise Refused(400, "prompt must be text, token ids, or a list of either")
        return ids or [self.model.base.bos]


class Front:
    """ASGI middleware that waits for vLLM's start, then adds the routes and tries the canaries."""

    def __init__(self, app: Any):
        self.app = app
        self.desk: Desk

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass everything on; when the server has started, open."""

        async def started(message: dict[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    await self.open(scope["app"])
                except Exception as error:
                    message = {"type": "lifespan.startup.failed", "message": f"not serving: {error}"}
                    atexit.register(os._exit, 2)  # vLLM would end with 0
            elif message["type"].startswith("lifespan.shutdown") and hasattr(self, "desk"):
                shutil.rmtree(self.desk.shelf.folder, ignore_errors=True)
            await send(message)

        await self.app(scope, receive, started if scope["type"] == "lifespan" else send)

    async def open(self, app: Any) -> None:
        """Load the compressor, wrap vLLM's routes, add ours, and compare with this project's decoder."""
        extra = app.state.vllm_config.kv_transfer_config.kv_connector_extra_config
        dtype = str(app.state.vllm_config.model_config.dtype).removeprefix("torch.")
        checkpoint, base, device = (extra[name] for name in ("checkpoint", "base", "device"))
        model = await asyncio.to_thread(Compressor.from_pretrained, checkpoint, base, device, dtype)
        store = None
        if extra["store"]:
            store = Store.open(extra["store"], base=model.base)
        catalogue = Catalogue(extra["memories"], extra["files"], extra["codec"], store)
        shelf = Shelf(extra["shelf"], extra["shelf_bytes"])
        self.desk = Desk(model, catalogue, shelf, extra["placeholder"], checkpoint)
        for route in app.routes:
            if getattr(route, "path", None) in (COMPLETIONS, CHAT, *WITHOUT):
                # Inside of vLLM's middleware: its API keys are asked for first.
                route.app = self._with_memories(route.app, route.path)

        for path, methods in (("/v1/memories", ["POST"]), ("/v1/memories/{id}", ["GET", "DELETE"])):
            app.router.routes.insert(0, Route(path, self._memories, methods=methods))
        await self.try_canaries(app, 0.02 if dtype == "float32" else 0.25)

    async def _memories(self, request: Any) -> Any:
        desk, name = self.desk, request.path_params.get("id")
        try:
            if request.method == "POST":
                return _reply(await desk.alone(desk.create, _object(await request.body())))
            if request.method == "DELETE":
                await desk.alone(desk.catalogue.delete, name)
                return _reply({"id": name, "object": "memory", "deleted": True})
            return _reply(await desk.alone(desk.describe, name))
        except CompressorError as error:
            return _reply(error)

    def _with_memories(self, inner: Any, path: str) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            data = await Request(scope, receive).body()
            with ExitStack() as reading:
                try:
                    body = _object(data)
                    if (placed := await self.desk.prepare(body, path)) is not None:
                        reading.callback(self.desk.shelf.give_back, placed)
                        data = json.dumps(body).encode()
                except CompressorError as error:
                    return await _reply(error)(scope, receive, send)
                messages = iter([{"type": "http.request", "body": data, "more_body": False}])

                async def again() -> Any:
                    return next(messages, None) or await receive()

                await inner(scope, again, send)

        return app

    async def try_canaries(self, app: Any, tolerance: float) -> None:
        """Refuse to serve if log-probabilities are more nats apart through vLLM than through this project's decoder."""
        desk, base = self.desk, self.desk.model.base
        key = next(iter(app.state.args.api_key or [os.environ.get("VLLM_API_KEY", "")])) or "none"
        headers = {"Authorization": f"Bearer {key}"}
        asked = {"prompt": "", "max_tokens": 12, "ignore_eos": True, "temperature": 0, "logprobs": 0}
        memories = await desk.alone(desk.model.compress, list(CANARIES))
        desk.canaries = {f"canary-{number}": memory for number, memory in enumerate(memories)}
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://canary", headers=headers, timeout=300
        ) as client:
            for name, memory in desk.canaries.items():
                reply = await client.post(COMPLETIONS, json={**asked, "memories": [name], "return_token_ids": True})
                if reply.status_code != 200:
                    raise CompressorError(f"the canary's request failed with {reply.status_code}: {reply.text[:300]}")
                (choice,), positions = reply.json()["choices"], reply.json()["usage"]["prompt_tokens"]
                (ours,) = score(base, memory_prefix(base, [memory]), [[base.bos]], [choice["token_ids"]])
                said = zip(choice["logprobs"]["token_logprobs"], ours[:, 0].tolist(), strict=True)
                if (apart := max(abs(a - b) for a, b in said)) > tolerance or positions != memory.tokens + 1:
                    found = f"up to {apart:.3f} nats apart, {positions} positions used instead of {memory.tokens + 1}"
                    raise CompressorError(f"vLLM reads memories otherwise than this project's decoder: {found}")
        desk.canaries = {}


def _object(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise Refused(400, "the request's body is no JSON object")
    return body


def _reply(said: dict[str, Any] | CompressorError) -> Any:
    """A JSON response; an error as OpenAI's API writes one."""
    if isinstance(said, dict):
        return JSONResponse(said)
    status = 404 if isinstance(said, Missing) else getattr(said, "status", 400)
    error = {"message": str(said), "type": "NotFoundError" if status == 404 else "BadRequestError", "code": status}
    return JSONResponse({"error": error}, status)
