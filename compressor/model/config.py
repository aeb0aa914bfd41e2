"""What a model is: the frozen base, and the compressor on top."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from compressor.data.prompts import CHAT, QUESTION, chat_arguments
from compressor.errors import require
from compressor.model.bases import default_checkpoint
from compressor.model.table import LAYOUTS, METHODS, layouts_of

if TYPE_CHECKING:
    Layout = str
    TrainedMethod = str
else:
    Layout, TrainedMethod = Literal[tuple(LAYOUTS)], Literal[tuple(METHODS)]
DType = Literal["auto", "float32", "bfloat16", "float16"]
BaseMismatch = Literal["refuse", "allow"]
"""What is done about a base with other weights than a checkpoint was trained on."""
Decoding = Literal["auto", "static", "compiled"]
"""How a base writes token by token (`Rows` of `compressor/model/generation.py`)."""
PassageAttention = Literal["causal", "bidirectional"]
MemoryAttention = Literal["passage", "tree", "parts"]


@dataclass
class CheckpointConfig:
    """Which compressor is loaded, and on which base."""

    checkpoint: str = ""
    """Compressor checkpoint: folder or hub id; by default the bundled one of smollm2-135m where this base is at hand
    (`compressor fetch smollm2-135m`), else that of arxiv-mini."""
    base: str | None = None
    """Frozen base: folder, hub id, GGUF file or name; by default the one the checkpoint names."""
    base_mismatch: BaseMismatch = "refuse"
    """allow: take a base with other weights than the checkpoint was trained on, with a warning."""

    def __post_init__(self) -> None:
        self.checkpoint = self.checkpoint or default_checkpoint()


@dataclass
class BaseConfig:
    """The frozen base language model."""

    path: str = "models/arxiv-mini/base"
    """Folder or hub id of a causal LM that transformers loads, a GGUF file, `REPO_ID:FILE.gguf` of the hub, or a name
    (`smollm2-135m`)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: DType = "float32"
    """Data type the weights are held in; `auto` is bfloat16 where the device is fast at it, else float32."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation; `sdpa` is eager for bases that have no other (Gemma 2), `auto` is torch's on
    an accelerator, and on a CPU one whose backward pass is several times as fast; rows that read one context share it
    (`compressor/model/kernels.py`)."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Load the frozen weights in 8 or 4 bits (needs the `quantised-base` extra): int8 anywhere, int4 on a
    GPU alone."""


@dataclass
class CompressorConfig:
    """LoRA encoder and memory tokens. Stored in every checkpoint as `compressor.json`."""

    method: TrainedMethod = "kv"
    """How a passage becomes a memory (`compressor/methods/`)."""
    memory_tokens: int = 16
    """Largest number of memory tokens k."""
    layout: Layout = "nested"
    """Where memory tokens sit while encoding and where the decoder starts (`compressor/model/layouts.py`)."""
    passage_attention: PassageAttention = "bidirectional"
    """Attention among passage tokens in the encoder."""
    memory_attention: MemoryAttention = "tree"
    """What memory tokens see of the passage: all of it (`passage`); in the layout `nested` a stretch, the shorter the
    later the token comes in its order (`tree`, `layouts.tree_stretches`); in `overlay` and `spread` the part in whose
    middle it stands (`parts`, `layouts.part_stretches`)."""
    lora_rank: int = 64
    """Rank of the LoRA matrices."""
    writer_rank: int = 64
    """Rank of the LoRA that memory tokens have for themselves, in methods with memory tokens; 0 for none: they share
    the passage's."""
    lora_alpha: float = 64.0
    """Scale of LoRA's output, times 1 / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout before LoRA's matrices."""
    lora_targets: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers that get LoRA: all of the base's, or those with these names, which the base must have. Layers that
    no memory depends on (the last one's queries, output and MLP) are always left out."""
    initialisation: Literal["vocabulary", "normal"] = "vocabulary"
    """Memory tokens start as the embeddings' mean plus noise of their spread, or as standard normal noise."""
    max_passage_tokens: int = 500
    """Longer passages are split into segments of at most this many tokens."""
    segment_tokens: int | None = None
    """Passages are split into segments of at most so many tokens where nothing else is asked for; by default of
    `max_passage_tokens`. For a compressor that keeps less of long passages than its memory tokens could hold."""
    question_template: str = QUESTION
    """Prompt of a question after a memory, with `{question}` in it; `chat` for the base's chat template, with arguments
    of it as in `chat {"enable_thinking": false}`."""
    text_encoder: str | None = None
    """Folder or hub id of the frozen text encoder of the method sentence-embedding; by default the base itself."""

    def __post_init__(self) -> None:
        if self.lora_targets == ["all-linear"]:
            self.lora_targets = "all-linear"
        # The command line checks these; a checkpoint's settings come straight here.
        allowed = {"passage_attention": get_args(PassageAttention), "memory_attention": get_args(MemoryAttention)}
        for name, known in {"method": tuple(METHODS), "layout": tuple(LAYOUTS), **allowed}.items():
            value = getattr(self, name)
            require(value in known, f"compressor.{name}", value, f"one of {', '.join(known)}")
        layouts = layouts_of(self.method)
        fits = f"{' or '.join(layouts)} with the method {self.method}"
        require(self.layout in layouts, "compressor.layout", self.layout, fits)
        parted = self.memory_attention != "parts" or self.layout in ("overlay", "spread")
        require(parted, "compressor.layout", self.layout, "overlay or spread with memory_attention parts")
        require(1 <= self.memory_tokens <= 512, "compressor.memory_tokens", self.memory_tokens, "1 to 512")
        for name, least in (("lora_rank", 1), ("writer_rank", 0), ("max_passage_tokens", 1)):
            require(getattr(self, name) >= least, f"compressor.{name}", getattr(self, name), f"at least {least}")
        shorter = self.segment_tokens is None or 1 <= self.segment_tokens <= self.max_passage_tokens
        most = f"at least 1 and at most compressor.max_passage_tokens = {self.max_passage_tokens}"
        require(shorter, "compressor.segment_tokens", self.segment_tokens, most)
        require(self.lora_alpha > 0, "compressor.lora_alpha", self.lora_alpha, "positive")
        require(0 <= self.lora_dropout < 1, "compressor.lora_dropout", self.lora_dropout, "in [0, 1)")
        require(bool(self.lora_targets), "compressor.lora_targets", self.lora_targets, "a non-empty list")
        asks = "{question}" in self.question_template or chat_arguments(self.question_template) is not None
        template = f"a text with {{question}} in it, or {CHAT}"
        require(asks, "compressor.question_template", self.question_template, template)
        even = self.layout != "nested" or self.memory_tokens & (self.memory_tokens - 1) == 0
        require(even, "compressor.memory_tokens", self.memory_tokens, "a power of two with the nested layout")
