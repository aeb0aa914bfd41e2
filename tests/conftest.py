"""Fixtures that all tests share: a tiny base on disk, a tiny compressor, and a tiny model of every family.

Nothing here uses the network or the caches of the person who runs the tests.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read when `datasets` and `transformers` are imported, here and in the commands that tests start.
_CACHE = tempfile.mkdtemp(prefix="compressor-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only cost
os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # the same figures on every machine; tests of a GPU say otherwise

PROJECT = Path(__file__).resolve().parents[1]
for place in (PROJECT / "tests", PROJECT):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

from forked import Program  # noqa: E402
from scripts import load_script  # noqa: E402

_PARTIAL = {"partial_rotary_factor": 0.5, "rope_type": "default", "rope_theta": 10000.0}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-yarn-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "gemma": ("gemma", {}),
    "phi": ("phi", {"rope_parameters": _PARTIAL}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "gpt-neox": ("gpt_neox", {"rope_parameters": {**_PARTIAL, "partial_rotary_factor": 0.25}, "head_dim": None}),
    "granite": ("granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}),
    "stablelm": ("stablelm", {"rope_parameters": {**_PARTIAL, "partial_rotary_factor": 0.25}}),
    "cohere": ("cohere", {}),
    "glm": ("glm", {"pad_token_id": 0, "rope_parameters": _PARTIAL}),
    "helium": ("helium", {}),
    "nemotron": ("nemotron", {"rope_parameters": _PARTIAL}),
    "ernie4-5": ("ernie4_5", {}),
    "falcon": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None}),
    "mistral-window": ("mistral", {"sliding_window": 256}),
    "phi3-window": ("phi3", {"pad_token_id": 0, "sliding_window": 256}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 1}),
    "starcoder2": ("starcoder2", {"sliding_window": 256}),
    "gemma2": ("gemma2", {"sliding_window": 256, **_SLIDING}),
    "gemma3": ("gemma3_text", {"sliding_window": 256, **_SLIDING}),
    "olmo3": ("olmo3", {"sliding_window": 256, **_SLIDING}),
    "cohere2": ("cohere2", {"sliding_window": 256, **_SLIDING}),
    "exaone4": ("exaone4", {"sliding_window": 256, "sliding_window_pattern": 3, **_SLIDING}),
    "dropout": ("phi", {"rope_parameters": _PARTIAL, "resid_pdrop": 0.5, "attention_dropout": 0.5}),
}
"""Families that must work: model type of transformers, and settings besides the common small ones."""


def family_model(family: str, **settings: Any) -> Any:
    """A random model of 3 layers and hidden size 64 of a family in `FAMILIES`, or of a transformers model type."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, special = FAMILIES.get(family, (family, {}))
    common = {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    chosen = {
        key: value for key, value in (common | special | settings).items() if value is not None or key not in common
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **chosen))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)  # else attention is nearly uniform and positions hardly matter
    return model.eval()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `family` runs for every family, one that takes `windowed` for those with a sliding window."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", list(FAMILIES))
    if "windowed" in metafunc.fixturenames:
        metafunc.parametrize("windowed", [name for name, (_, one) in FAMILIES.items() if one.get("sliding_window")])


@pytest.fixture
def make_family_base(tiny_base_folder: Path) -> Callable[..., Any]:
    """Builds a `Base` around a tiny random model of a family, with the tiny tokenizer."""
    from transformers import PreTrainedTokenizerFast

    from compressor.model.base import Base

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_base_folder)

    def make(family: str, **settings: Any) -> Base:
        return Base(family_model(family, **settings), tokenizer, family)

    return make


def pytest_collection_finish() -> None:
    """The libraries stay: collecting garbage, as commands do between methods, need not go through them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the repository."""
    return PROJECT


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """A few hundred real abstracts."""
    import pyarrow.parquet as pq

    table = pq.read_table(PROJECT / "data" / "arxiv-train.parquet")
    name = "text" if "text" in table.column_names else "abstract"
    return table.column(name).to_pylist()[:300]


@pytest.fixture(scope="session")
def from_scratch() -> Any:
    """`examples/from_scratch.py`, which makes a base."""
    return load_script(PROJECT / "examples" / "from_scratch.py")


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str], from_scratch: Any) -> Path:
    """A saved Llama of 3 layers and hidden size 32, random weights, with a byte-level BPE of 512 tokens."""
    import torch

    folder = tmp_path_factory.mktemp("base") / "tiny-base"
    tokenizer = from_scratch.train_tokenizer(texts, 512)
    shape = {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    model = from_scratch.make_model(tokenizer, hidden=32, layers=3, heads=4, **shape)
    # Random weights of the usual spread give nearly uniform logits; wider ones make each test say more.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """The tiny base as llama.cpp would write it: Q8_0 matrices, its byte-level BPE, and a chat template.

    Begins and ends texts, and turns of a chat, with the same tokens, as SmolLM2-Instruct does.
    """
    import gguf
    from gguf.quants import quantize
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("gguf")
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(tiny_base_folder)
    writer = gguf.GGUFWriter(folder / "tiny.Q8_0.gguf", "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(m) for m in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(
        "{% for m in messages %}<bos>{{ m['role'] }}\n{{ m['content'] }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        data = weight.numpy()
        if count := heads.get(name.split(".")[-2]):  # llama.cpp turns neighbouring dimensions, transformers halves
            data = data.reshape(count, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if data.ndim == 2 else None
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), quantize(data, kind) if kind else data, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.Q8_0.gguf"


@pytest.fixture(scope="session")
def make_tiny_base(tiny_base_folder: Path) -> Callable[[], Any]:
    """Copies the tiny base, which is loaded once: a compressor puts its adapters into it."""
    from compressor.model.config import BaseConfig
    from compressor.model.load import load_base

    loaded = load_base(BaseConfig(path=str(tiny_base_folder)))
    return lambda: copy.deepcopy(loaded)


@pytest.fixture
def tiny_base(make_tiny_base: Callable[[], Any]) -> Any:
    """A tiny base of one's own."""
    return make_tiny_base()


@pytest.fixture(scope="session")
def make_tiny_compressor(make_tiny_base: Callable[[], Any]) -> Callable[..., Any]:
    """Builds a compressor on a fresh tiny base: 8 memory tokens and LoRA rank 4, other settings by keyword.

    `stirred` gives the adapters' B matrices random values, so that switching them matters (LoRA starts at zero).
    """
    import torch

    from compressor.model.config import CompressorConfig
    from compressor.training.objectives import Trainee

    def make(stirred: bool = True, base: Any = None, seed: int = 0, **settings: Any) -> Trainee:
        settings = {
            "memory_tokens": 8,
            "lora_rank": 4,
            "writer_rank": 4,
            "lora_alpha": 8.0,
            "max_passage_tokens": 64,
        } | settings
        base = make_tiny_base() if base is None else base
        model = Trainee(base, CompressorConfig(**settings), seed)
        if stirred:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model

    return make


@pytest.fixture
def tiny_compressor(make_tiny_compressor: Callable[..., Any]) -> Any:
    """A compressor with 8 memory tokens on a fresh tiny base."""
    return make_tiny_compressor()


@pytest.fixture
def text_encoder(tmp_path: Path) -> str:
    """A saved random DistilBERT that takes 32 tokens."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path / "text-encoder"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(words), dim=24, hidden_dim=48, n_layers=2, n_heads=2, max_position_embeddings=32
    )
    DistilBertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> tuple[str, str]:
    """Paths of small training and validation files (JSON lines)."""
    folder = tmp_path_factory.mktemp("corpus")
    paths = []
    for name, chosen in (("train", texts[:60]), ("validation", texts[60:68])):
        path = folder / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"id": f"{name}-{i}", "text": text}) + "\n" for i, text in enumerate(chosen))
        )
        paths.append(str(path))
    return paths[0], paths[1]


@pytest.fixture(scope="session")
def no_estimate() -> None:
    """A third of a run's start goes into the estimate of its memory, and runs start by the dozen."""
    from compressor.commands import train

    train.step_bytes = lambda *_: 0


@pytest.fixture(scope="session")
def training_options(tiny_base_folder: Path, corpus: tuple[str, str], no_estimate: None) -> list[str]:
    """Command line of a run that does a step in a few hundredths of a second; `--output` is missing."""
    options = {
        "base.path": str(tiny_base_folder),
        "compressor.memory_tokens": "4",
        "compressor.lora_rank": "2",
        "compressor.lora_dropout": "0.1",
        "compressor.max_passage_tokens": "32",
        "objective.tokens": '[{"tokens": 4}, {"tokens": 2}]',
        "objective.continuation": "0.3",
        "data.train": f'["{corpus[0]}"]',
        "data.validation": f'["{corpus[1]}"]',
        "data.validation_limit": "4",
        "data.lengths": '[{"low": 4, "high": 32}]',
        "training.batch_tokens": "128",
        "training.warmup_steps": "3",
        "training.learning_rate": "1e-2",
        "training.mixed_precision": "no",
        "training.log_every": "1",
        "training.threads": "1",
    }
    return [f"--{key}={value}" for key, value in options.items()]


# `train.py` with something changed.
_CHANGED = """
import os, signal, sys
sys.path.insert(0, {project!r})
from compressor.commands.cli import train_main
{change}
sys.exit(train_main())
"""
# Processes kill themselves when they train on this micro-batch or a later one.
_DYING = """
from compressor.training import loop
from compressor.training.regenerate import CompressionStage
honest, honest_step, begun = CompressionStage.micro_batch, loop.run_step, []
def run_step(*given):
    begun.append(1)
    return honest_step(*given)
def micro_batch(self, index):
    if begun and index >= {index}:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(self, index)
CompressionStage.micro_batch, loop.run_step = micro_batch, run_step
"""


class TrainingCommand:
    """Runs `train.py` as a command of its own on the CPU: forked processes, or through `accelerate launch`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started: list[Program | subprocess.Popen[str]] = []

    def start(
        self,
        argv: list[str],
        processes: int = 1,
        dies_at: int | None = None,
        launch: str | None = None,
        change: str = "",
    ) -> Program | subprocess.Popen[str]:
        """Start it; with `dies_at`, its processes get SIGKILL at that micro-batch, however fast they are.

        `launch`: a file of configs/accelerate; without one the processes are told of each other as launchers do it.
        `change`: Python that runs before.
        """
        script = PROJECT / "train.py"
        if dies_at is not None:
            change += _DYING.format(index=dies_at)
        if change:
            script = self.folder / f"changed-{len(self.started)}.py"
            script.write_text(_CHANGED.format(project=str(PROJECT), change=change))
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}
        process: Program | subprocess.Popen[str]
        if launch is None:
            own = self.folder / f"program-{len(self.started)}"
            own.mkdir()
            process = Program([str(script), *argv], own, PROJECT, environment, processes, merged=True)
        else:
            launcher = f"-m accelerate.commands.accelerate_cli launch --config_file configs/accelerate/{launch} "
            launcher += f"--num_processes {processes} --num_cpu_threads_per_process 1 --main_process_port 0"
            if launch == "cpu.yaml":
                del environment["ACCELERATE_USE_CPU"]  # as people do it: the file says so
            process = subprocess.Popen(
                [sys.executable, *launcher.split(), str(script), *argv],
                cwd=PROJECT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def finish(self, process: Any) -> str:
        """What a run printed that must end well."""
        printed = process.communicate(timeout=600)[0]
        assert process.returncode == 0, printed
        return printed

    def rows(self, output: Path) -> list[dict[str, Any]]:
        """The log without running times."""
        found = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in found]

    def wait_for_rows(self, process: Any, output: Path, count: int) -> None:
        """Until the run has logged so many rows."""
        log, patience = output / "log.jsonl", time.monotonic() + 240
        while not log.exists() or log.read_text().count("\n") < count:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < patience
            time.sleep(0.01)


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCommand]:
    """`train.py` as a command; what still runs in the end is killed."""
    command = TrainingCommand(tmp_path_factory.mktemp("scripts"))
    yield command
    for process in command.started:
        if process.poll() is None:
            process.kill() if isinstance(process, Program) else os.killpg(process.pid, 9)
            process.wait()


@pytest.fixture
def program(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Callable[..., tuple[int | None, str, str]]:
    """Runs `python ARGUMENTS` in the project's folder: status, what it printed, its errors."""

    def run(*argv: str | Path, cwd: Path = project, processes: int = 1, **environment: str) -> Any:
        given = os.environ | {"ACCELERATE_USE_CPU": "true"} | environment
        started = Program(argv, tmp_path_factory.mktemp("program"), cwd, given, processes)
        out, err = started.communicate()
        return started.returncode, out, err

    return run


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test names no checkpoint it means the small one, whatever base this machine has."""
    monkeypatch.setattr("compressor.model.bases.FLAGSHIP", "models/arxiv-mini/compressor")
    monkeypatch.setattr("compressor.model.bases.WRITER", "models/arxiv-mini/base")
