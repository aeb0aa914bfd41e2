"""The front: runs in vLLM's own API server (`--middleware`), makes memories, and puts them into requests by id.

It adds `/v1/memories` to vLLM's routes and looks into the bodies of completions and chats alone; all else is vLLM's.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.api import Compressor
from compressor.data.prompts import tokenise
from compressor.errors import CompressorError, require_texts, require_whole
from compressor.model.checkpoint import compressor_name
from compressor.model.fidelity import fidelities
from compressor.model.generation import regeneration_limit, score
from compressor.model.memory import Memory, memory_prefix, signed
from compressor.serving.shelf import Folder, Library, Placed, Refused, Shelf
from compressor.storage.codec import Codec
from compressor.storage.memory_file import as_stored

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WITHOUT = ("/v1/responses", "/v1/messages")
"""Routes that answer, too, and do not read memories: a request that names some there is refused."""
UNREADABLE = (
    *("echo", "suffix", "prompt_logprobs", "prompt_embeds", "truncate_prompt_tokens", "chat_template"),
    "continue_final_message",
)
"""Settings of a request that read its prompt as text, cut it, or replace the template: not with memories."""
MOST_STEPS, MOST_MEMORIES = 100, 64
CANARIES = (
    "The committee met on 3 March and chose the smaller of the two bridges, since its cost was known.",
    "Glass cools slowly in an oven so that its layers do not pull against each other and break.",
)
TOLERANCE = {"float32": 0.02}
"""Nats by which a token's log-probability may differ from this project's decoder, by type; else a quarter."""
App = Callable[..., Awaitable[None]]


class Desk:
    """Makes memories, finds them by id and places them for a request.

    Args:
        model: the compressor, whose base has the type that vLLM runs in.
        library: where memories are kept.
        shelf: where vLLM's workers find them.
        placeholder: the token whose positions memories take.
        name: the compressor's, for the memories it makes.
        codec: what memories are stored with, None for the type they are held in.
    """

    def __init__(
        self, model: Compressor, library: Library, shelf: Shelf, placeholder: int, name: str, codec: str | None = None
    ):
        self.model, self.library, self.shelf, self.placeholder, self.codec = model, library, shelf, placeholder, codec
        self.name = compressor_name(model, name)
        self.canaries: dict[str, Memory] = {}
        self._work = asyncio.Lock()

    async def alone(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run work in a thread, one piece at a time, so that requests under way go on."""
        async with self._work:
            return await asyncio.to_thread(work, *arguments)

    # -- memories ----------------------------------------------------------------------------------------------------

    def create(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Compress `text`, with its settings, unless that memory is there; what `describe` says."""
        if unknown := set(wanted) - {"text", "tokens", "segment_tokens", "refine_steps"}:
            raise Refused(400, f"{min(unknown)!r} is no setting of a memory: give text, tokens, segment_tokens")
        text = wanted.get("text")
        require_texts("text", [text])
        tokens, segment_tokens, steps = (wanted.get(name) for name in ("tokens", "segment_tokens", "refine_steps"))
        require_whole("refine_steps", steps or 0, 0, MOST_STEPS)
        content = json.dumps([self.name, self.codec, tokens, segment_tokens, steps or 0, text])
        name = hashlib.sha256(content.encode()).hexdigest()[:32]
        try:
            return self.describe(name)
        except Refused:
            pass
        model = self.model
        (ids,) = tokenise(model.base.tokenizer, [text])
        (memory,) = model.compress_ids([ids], tokens, segment_tokens=segment_tokens, refine_steps=steps or 0)
        codec = Codec.parse(self.codec) if self.codec else None
        stored = as_stored(memory, codec) if codec else memory
        (fidelity,) = fidelities(model, [stored], [ids])
        self.library.add(name, replace(signed(memory, model.base, self.name), fidelity=fidelity))
        return self.describe(name)

    def describe(self, name: str) -> dict[str, Any]:
        """What `GET /v1/memories/ID` tells."""
        self.library.version(name)
        memory = self.load(name)
        return {
            "id": name,
            "object": "memory",
            "tokens": memory.tokens,
            "passage_tokens": memory.passage_tokens,
            "ratio": round(memory.passage_tokens / memory.tokens, 3),
            "segments": len(memory.segments),
            "fidelity": memory.fidelity,
            "bytes": self.library.size(name),
            "compressor": memory.compressor,
        }

    def load(self, name: str, tokens: int | None = None) -> Memory:
        """A memory, or of `ID:N` its N-th segment, from 0 on; cut to `tokens` a segment."""
        name, _, part = name.partition(":")
        try:
            memory = self.canaries.get(name) or self.library.load(name)
        except Refused:
            raise
        except CompressorError as error:
            raise Refused(422, f"memory {name!r} cannot be read: {error}") from None
        if part:
            if not part.isdecimal() or int(part) >= len(memory.segments):
                raise Refused(
                    404, f"memory {name!r} has {len(memory.segments)} segments, from 0 on, and no {part[:9]!r}"
                )
            memory = memory.split()[int(part)]
        return memory if tokens is None else memory.truncate(tokens)

    def place(self, names: Any, tokens: Any = None) -> Placed:
        """Put memories on the shelf, one after the other in one context."""
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise Refused(400, f"memories = {str(names)[:80]} must be a list of ids, at least one")
        if len(names) > MOST_MEMORIES:
            raise Refused(400, f"a request takes at most {MOST_MEMORIES} memories, got {len(names)}")
        if tokens is not None:
            require_whole("memory_tokens", tokens)
        plain = [name.partition(":")[0] for name in names]
        versions = ["" if name in self.canaries else self.library.version(name) for name in plain]

        def load() -> Memory:
            return Memory.concatenate([self.load(name, tokens) for name in names])

        try:
            return self.shelf.put((str(tokens), *names, *versions), self.model.base, load)
        except Refused:
            raise
        except CompressorError as error:
            # Whole memories that do not fit this server, or each other.
            raise Refused(400 if tokens is not None else 422, str(error)) from None

    # -- requests ----------------------------------------------------------------------------------------------------

    async def prepare(self, body: dict[str, Any], path: str) -> Placed | None:
        """Turn `memories` of a request to a path into what the connector reads; None where it names none."""
        chat = path == CHAT
        names, tokens = body.pop("memories", None), body.pop("memory_tokens", None)
        params = body.get("kv_transfer_params")
        params = params if isinstance(params, dict) else {}
        own = "memory" in params
        if names is None and not own:
            if tokens is not None:
                raise Refused(400, "memory_tokens says how many tokens of memories to use: name them in memories")
            return None
        if path in WITHOUT:
            raise Refused(400, f"{path} reads no memories: use {CHAT} or {COMPLETIONS}")
        if own:
            if names is not None or chat:
                raise Refused(400, "kv_transfer_params name a memory: leave it to the server, give memories alone")
            names = [params["memory"]]
        if wrong := [name for name in UNREADABLE if body.get(name)]:
            raise Refused(400, f"{wrong[0]} cannot be used with memories, whose positions hold no text: leave it out")
        placed: Placed = await self.alone(self.place, names, tokens)
        if own and (params.get("tokens") != placed.tokens or not self._has_places(body.get("prompt"), placed.tokens)):
            raise Refused(
                400,
                f"memory {str(params['memory'])[:80]!r} has {placed.tokens} tokens: give tokens = {placed.tokens} and "
                f"as many placeholders ({self.placeholder}) before the prompt's ids, or give memories instead",
            )
        body["kv_transfer_params"] = {"memory": placed.name, "tokens": placed.tokens}
        body["cache_salt"] = ":".join([placed.name, *filter(None, [body.get("cache_salt")])])
        if chat:
            body["chat_template_kwargs"] = {**(body.get("chat_template_kwargs") or {}), "memory_tokens": placed.tokens}
            body["add_special_tokens"] = False
        elif not own:
            given = body.get("prompt") or ""
            several = isinstance(given, list) and not isinstance(given[0], int)
            ids = [self._ids(one) for one in (given if several else [given])]
            prompts = [[self.placeholder] * placed.tokens + one for one in ids]
            body["prompt"] = prompts if several else prompts[0]
            if not given:
                body.setdefault("max_tokens", regeneration_limit(placed.passage_tokens))
        return placed

    def _has_places(self, prompt: Any, tokens: int) -> bool:
        return isinstance(prompt, list) and len(prompt) > tokens and prompt[:tokens] == [self.placeholder] * tokens

    def _ids(self, prompt: Any) -> list[int]:
        """Token ids of what follows a memory; without anything BOS, which asks for the passage again."""
        if isinstance(prompt, str):
            ids = tokenise(self.model.base.tokenizer, [prompt])[0]
            return ids or [self.model.base.bos]
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise Refused(400, "prompt must be text, token ids, or a list of either")
        return prompt or [self.model.base.bos]


class Front:
    """ASGI middleware that waits for vLLM's start, then adds the routes and tries the canaries."""

    def __init__(self, app: App):
        self.app = app
        self.desk: Desk

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass everything on; when the server has started, open."""
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return

        async def started(message: dict[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    await self.open(scope["app"])
                except Exception as error:
                    message = {"type": "lifespan.startup.failed", "message": f"not serving: {error}"}
                    atexit.register(os._exit, 2)  # vLLM would end with 0
            elif message["type"] == "lifespan.shutdown.complete" and hasattr(self, "desk"):
                self.desk.shelf.close()
            await send(message)

        await self.app(scope, receive, started)

    async def open(self, app: Any) -> None:
        """Load the compressor, wrap vLLM's routes, add ours, and compare with this project's decoder."""
        from starlette.routing import Route

        extra = app.state.vllm_config.kv_transfer_config.kv_connector_extra_config
        dtype = str(app.state.vllm_config.model_config.dtype).removeprefix("torch.")
        model = await asyncio.to_thread(
            Compressor.from_pretrained, extra["checkpoint"], extra["base"], extra["device"], dtype
        )
        library = Folder(extra["memories"], extra["files"], extra["codec"])
        shelf = Shelf(Path(extra["shelf"]), extra["shelf_bytes"])
        self.desk = Desk(model, library, shelf, extra["placeholder"], extra["checkpoint"], extra["codec"])
        for route in app.routes:
            if getattr(route, "path", None) in (COMPLETIONS, CHAT, *WITHOUT):
                # Inside of vLLM's middleware: its API keys are asked for first.
                route.app = self._with_memories(route.app, route.path)
        app.router.routes[:0] = [
            Route("/v1/memories", self._answering(self._create), methods=["POST"]),
            Route("/v1/memories/{id}", self._answering(self._get), methods=["GET"]),
            Route("/v1/memories/{id}", self._answering(self._delete), methods=["DELETE"]),
        ]
        await self._try_canaries(app, dtype)

    def _with_memories(self, inner: App, path: str) -> App:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            data = b""
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                data += message.get("body", b"")
                if not message.get("more_body"):
                    break
            with ExitStack() as reading:
                try:
                    body = json.loads(data)
                    placed = await self.desk.prepare(body, path) if isinstance(body, dict) else None
                    if placed is not None:
                        reading.enter_context(self.desk.shelf.reading(placed))
                        data = json.dumps(body).encode()
                except CompressorError as error:
                    await _refusal(error)(scope, receive, send)
                    return
                except ValueError:
                    pass  # no JSON: vLLM says so
                sent = False

                async def again() -> dict[str, Any]:
                    nonlocal sent
                    if sent:
                        return await receive()
                    sent = True
                    return {"type": "http.request", "body": data, "more_body": False}

                await inner(scope, again, send)

        return app

    def _answering(self, work: Callable[[Any], Awaitable[dict[str, Any]]]) -> Any:
        from starlette.responses import JSONResponse

        async def endpoint(request: Any) -> Any:
            try:
                return JSONResponse(await work(request))
            except CompressorError as error:
                return _refusal(error)

        return endpoint

    async def _create(self, request: Any) -> dict[str, Any]:
        try:
            body = await request.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise Refused(400, 'the body is no JSON object: give {"text": "..."}')
        return await self.desk.alone(self.desk.create, body)

    async def _get(self, request: Any) -> dict[str, Any]:
        return await self.desk.alone(self.desk.describe, request.path_params["id"])

    async def _delete(self, request: Any) -> dict[str, Any]:
        name = request.path_params["id"]
        await self.desk.alone(self.desk.library.delete, name)
        return {"id": name, "object": "memory", "deleted": True}

    async def _try_canaries(self, app: Any, dtype: str) -> None:
        """Refuse to serve unless memories regenerate through vLLM as through this project's decoder."""
        import httpx

        desk, base = self.desk, self.desk.model.base
        key = next(iter(app.state.args.api_key or [os.environ.get("VLLM_API_KEY", "")]))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        memories = await desk.alone(desk.model.compress, list(CANARIES))
        desk.canaries = {f"canary-{number}": memory for number, memory in enumerate(memories)}
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://canary", headers=headers) as client:
            for name, memory in desk.canaries.items():
                asked = {"prompt": "", "memories": [name], "max_tokens": 12, "temperature": 0, "logprobs": 0}
                reply = await client.post(COMPLETIONS, json={**asked, "return_token_ids": True}, timeout=300)
                if reply.status_code != 200:
                    raise CompressorError(f"the canary's request failed with {reply.status_code}: {reply.text[:300]}")
                (choice,), usage = reply.json()["choices"], reply.json()["usage"]
                (ours,) = score(base, memory_prefix(base, [memory]), [[base.bos]], [choice["token_ids"]])
                found = choice["logprobs"]["token_logprobs"]
                apart = max(abs(a - b) for a, b in zip(found, ours[:, 0].tolist(), strict=True))
                if apart > TOLERANCE.get(dtype, 0.25):
                    raise CompressorError(
                        f"vLLM reads memories otherwise than this project's decoder: log-probabilities are up to "
                        f"{apart:.3f} nats apart, in {dtype}"
                    )
                if usage["prompt_tokens"] != memory.tokens + 1:
                    raise CompressorError(f"usage counts {usage['prompt_tokens']} positions, not {memory.tokens + 1}")
        desk.canaries = {}


def _refusal(error: CompressorError) -> Any:
    """The error as OpenAI's API writes one."""
    from starlette.responses import JSONResponse

    status = getattr(error, "status", 400)
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    return JSONResponse({"error": {"message": str(error), "type": kind, "param": "memories", "code": status}}, status)
