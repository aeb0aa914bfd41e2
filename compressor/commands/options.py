"""What commands take, apart from what they do with it: options are parsed and checked before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from compressor.data.prompts import QUESTION
from compressor.errors import CompressorError, require
from compressor.evaluation.settings import EvaluationConfig
from compressor.evaluation.table import entry, readers
from compressor.model.config import BaseMismatch, CheckpointConfig, DType
from compressor.parsing import read_yaml, settings_of
from compressor.storage.making import Making


@dataclass(kw_only=True)
class CheckpointOptions(CheckpointConfig):
    """What commands that load a compressor take."""

    device: str = "cpu"


@dataclass(kw_only=True)
class ModelOptions(CheckpointOptions):
    """What commands take that make memories."""

    base_dtype: DType = "float32"
    """Type the base computes in; auto: bfloat16 on GPUs and on processors that are made for it, which is several times
    faster and rounds."""


@dataclass(kw_only=True)
class DemoConfig(ModelOptions):
    """Options of the demo."""

    text: str | None = None
    """File with the passage, or - for standard input; by default an unseen abstract that ships with the project."""
    tokens: int | None = None
    """Memory tokens; by default all the compressor has."""
    length: int | None = None
    """Use the first so many tokens of the passage; by default 96 of the shipped abstract, all of your own text and all
    of what a question is about."""
    segment_tokens: int | None = None
    """Compress in segments of at most so many tokens, each to `tokens` memory tokens; by default as the compressor's
    settings say (96 for SmolLM2's)."""
    refine_steps: int | None = None
    """Gradient steps on the memory: 10 to 50 keep far more with few memory tokens; by default none, and the shipped
    example is shown after 10 too."""
    question: str | None = None
    """Answer this question about the passage instead of regenerating it."""
    example: str = "abstract"
    """A text that ships with the project: `abstract`, `published` (the example of the 500xCompressor paper, with its
    question), or the number of another test abstract."""
    port: int | None = None
    """Port of the page (--web); by default the first free one from 7860 on. It is served to this machine alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.port is None or 1 <= self.port <= 65535, "port", self.port, "1 to 65535")
        for name, low in {"tokens": 1, "segment_tokens": 1, "refine_steps": 0, "length": 1}.items():
            value = getattr(self, name)
            require(value is None or value >= low, name, value, f"at least {low}")


@dataclass(kw_only=True)
class FetchOptions:
    """What `compressor fetch` takes."""

    base: str
    """A name (smollm2-135m, or the text encoder all-minilm-l6-v2), hub id, GGUF file or REPO_ID:FILE.gguf."""
    revision: str | None = None
    """Of a hub repository: branch, tag or commit."""


@dataclass(kw_only=True)
class MakeOptions(ModelOptions, Making):
    """What commands that make memories take."""

    output: str
    """What to write."""
    warn_below: float = 0.9
    """Warn of memories from which a smaller share of the text comes back."""
    keep_text: bool = False
    """Keep the text with the memory."""

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        Making.__post_init__(self)
        require(0 <= self.warn_below <= 1, "warn_below", self.warn_below, "0 to 1")


@dataclass(kw_only=True)
class CompressOptions(MakeOptions):
    """What `compressor compress` takes."""

    text: str
    """File with the passage, or - for standard input."""
    output: str
    """Memory file to write."""
    keep_text: bool = False
    """Keep the text with the memory, packed under the base's predictions (about a second for each 100 tokens), for
    `compressor regenerate --exact`."""
    speech: str | None = None
    """Speech recogniser (folder or hub id) of a WAV file."""


@dataclass(kw_only=True)
class IndexOptions(MakeOptions):
    """What `compressor index` takes."""

    source: str
    """Corpus, each record of which becomes a memory, as each text file of a folder does: JSONL, JSON, CSV, TSV,
    Parquet, text files, a folder, a glob, several with commas, or a shipped name."""
    output: str
    """Folder of the store, or URI of object storage; a store that is there is added to."""
    codec: str | None = "int4+ans"
    """float32, float16, bf16, int8, int4, int3, int2 or lowrank:RATE; with +ans or +huffman it is coded."""
    encoder: str | None = None
    """What makes vectors to find texts by: a sentence-transformers id, a folder, all-minilm-l6-v2 (`compressor fetch`
    gets it), or bm25 for their words instead; by default the store's own, else all-minilm-l6-v2 where it is at hand."""
    keep_text: bool = False
    """Keep the texts too, for `ask --texts` and `regenerate --exact`; bm25 always does."""
    commit_every: int = 256
    """Memories written together: what a killed run loses at most, for each process."""
    text_field: str | None = None
    """Field that holds the text; by default text or abstract."""
    limit: int | None = None
    """Only the first so many records."""
    skip_bad_records: bool = False
    """Leave records out that are null, blank or broken, up to one in twenty, and count them in the store; otherwise the
    first of them is an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.commit_every >= 1, "commit_every", self.commit_every, "at least 1")


@dataclass(kw_only=True)
class CalibrateOptions(ModelOptions):
    """What `compressor calibrate` takes."""

    output: str
    """Calibration to write, a safetensors file."""
    data: str = "arxiv-train"
    """Passages like those to be compressed, not those to be evaluated on: a file, corpus folder or shipped name."""
    tokens: int | None = None
    """Memory tokens; by default all the compressor has."""
    lengths: list[int] = field(default_factory=list)
    """Passages are cut to these lengths in turn; those that are shorter are taken whole. By default as long as the
    compressor's segments, where its settings say that, else 96, 192 and 384."""
    limit: int = 600
    """Passages to compress."""
    skip_bad_records: bool = False
    """Leave passages out that are null, blank or broken, up to one in twenty."""
    rank: int = 384
    """Most principal components."""
    sensitivity: int = 150
    """Passages on which the decoder's sensitivity is measured; 0 weighs all channels alike."""
    resume: bool = False
    """Go on with a calibration that was interrupted, if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.limit >= 8, "limit", self.limit, "at least 8")
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(self.sensitivity >= 0, "sensitivity", self.sensitivity, "at least 0")
        require(not self.lengths or min(self.lengths) >= 1, "lengths", self.lengths, "token counts of at least 1")


@dataclass(kw_only=True)
class InspectOptions:
    """What `compressor inspect` takes."""

    file: str
    """Memory file, store or calibration."""


@dataclass(kw_only=True)
class MemoryOptions:
    """What commands that read a memory take."""

    memory: str
    """Memory file that `compressor compress` wrote, or store of `compressor index`."""
    id: str | None = None
    """Which memory of a store."""
    calibration: str | None = None
    """Calibration of the memory's codec, if it is not beside it as calibration.safetensors."""
    base: str = ""
    """The frozen base it was made with: folder, hub id, GGUF file or name; by default that of the bundled compressors
    which has its weights. Adapters are not needed."""
    base_mismatch: BaseMismatch = "refuse"
    """allow: read the memory with a base of other weights than made it, with a warning."""
    base_dtype: DType = "float32"
    """Type the base computes in; auto: bfloat16 on GPUs and on processors that are made for it."""
    tokens: int | None = None
    """Use only the first so many memory tokens of each segment."""
    temperature: float = 0.0
    """0 is greedy; above 0 samples."""
    seed: int = 0
    device: str = "cpu"


@dataclass(kw_only=True)
class RegenerateOptions(MemoryOptions):
    """What `compressor regenerate` takes."""

    exact: bool = False
    """Give the text that `compress --keep-text` kept, the same bytes (those of UTF-16 as UTF-8), instead of what the
    memory tokens give."""


@dataclass(kw_only=True)
class AskOptions(MemoryOptions):
    """What `compressor ask` takes."""

    memory: str | None = None  # type: ignore[assignment]
    """Memory file to ask; or, with --id, store."""
    store: str | None = None
    """Store to ask: records like the question are found, and read together."""
    top: int = 1
    """How many records of a store are read together; more than a compressor was trained for spoil the answer."""
    texts: bool = False
    """Read the texts of the store's records, where they are kept, instead of their memories."""
    question: str = ""
    """A question or an instruction; or a WAV file with a spoken one."""
    prompt: str | None = None
    """Preset in configs/tasks or a YAML file, instead of a question: its instruction, labels and length."""
    new_tokens: int = 48
    """Most tokens of the answer."""
    speech: str | None = None
    """Speech recogniser (folder or hub id) of a spoken question."""
    template: str = QUESTION
    """Prompt of the question, with `{question}` in it, or `chat`."""
    recite: bool = False
    """Write the passage back first and answer from that text, after the prefix that ships for SmolLM2: slower, and
    right more often where most of the passage comes back."""

    def __post_init__(self) -> None:
        if self.store is not None and self.memory is not None and not self.question:
            # The one plain argument beside --store.
            self.memory, self.question = None, self.memory  # type: ignore[assignment]
        if (self.memory is None) == (self.store is None):
            both = "" if self.memory is None else f", not both ({self.memory}, {self.store})"
            raise CompressorError(f"say what to ask: --memory FILE, or --store STORE{both}")
        for name in ("top", "new_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        # Each of these would go unheeded, and the answer be another one than was asked for.
        if self.store is not None and self.id is not None:
            raise CompressorError(
                f"--id {self.id} names one memory, and --store finds records that are like the question: give --memory "
                f"{self.store} --id {self.id}, or leave --id out"
            )
        if self.store is None and (self.texts or self.top > 1):
            unread = "--texts" if self.texts else f"--top {self.top}"
            raise CompressorError(
                f"{unread} is of records that are found in a store: give --store STORE, or leave it out"
            )
        if self.store is not None and self.texts and self.recite:
            raise CompressorError("--recite and --texts are two ways of reading records: give one")


@dataclass(kw_only=True)
class TranscribeOptions:
    """What `compressor transcribe` takes."""

    audio: str
    """WAV file."""
    output: str = ""
    """Text file to write; by default standard output."""
    speech: str | None = None
    """Speech recogniser: folder or hub id."""
    device: str = "cpu"


@dataclass(kw_only=True)
class ServeOptions(CheckpointOptions):
    """What `compressor serve` takes; what follows `--` goes to vLLM as it is."""

    memories: str = "outputs/memories"
    """Folder of the files ID.memory, to which POST /v1/memories adds."""
    files: list[str] = field(default_factory=list)
    """Memory files elsewhere, whose ids are their names."""
    store: str | None = None
    """Store of `compressor index`, whose memories are found by their ids, too, and by `retrieve` in requests."""
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that vLLM and the compressor run in."""
    device: str = "cpu"
    """Device of the compressor; vLLM's is its own choice."""
    codec: str | None = None
    """How memories are stored (`compressor compress --codec`); by default in the type they are held in."""
    template: str | None = None
    """Prompt of a chat's question with {question} in it, or chat for the base's own; by default the compressor's."""
    cache_mb: int = 1024
    """Megabytes of decoded memories on the shelf, from which vLLM's workers read them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.port < 1 << 16, "port", self.port, "1 to 65535")
        require(self.cache_mb >= 1, "cache_mb", self.cache_mb, "at least 1")


def evaluation_settings(argv: Sequence[str]) -> type[EvaluationConfig]:
    """The settings of the task that a command line, or the file that it names with --config, asks for.

    Raises:
        CompressorError: there is no such task, or it does not read a setting that is given.
    """
    given: dict[str, Any] = {}
    for place, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            continue
        value = value if equals else "".join(argv[place + 1 : place + 2])
        if name == "--config" and value and not value.startswith("--"):
            given |= read_yaml(value)
        given[name[2:].replace("-", "_")] = value
    task = given.get("task", EvaluationConfig.task)
    chosen = entry(f"{task}").settings
    for name in given:
        if name not in settings_of(chosen) and (elsewhere := readers(name)):
            raise CompressorError(
                f"{name} means nothing to --task {task}: leave it out (it is read by {', '.join(elsewhere)})"
            )
    return chosen
