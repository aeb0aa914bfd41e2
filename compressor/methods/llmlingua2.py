"""`llmlingua2`: the words that a token classifier keeps (LLMLingua-2, arXiv 2403.12968; the llmlingua package)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from compressor.errors import CompressorError, lacking
from compressor.methods.interface import MethodSettings, TokenMethod
from compressor.model.base import Base
from compressor.processes import bars_on_terminals


class LLMLingua2(TokenMethod):
    """The passage's words of the highest probability of being kept, as many of them as fit into k tokens.

    The package compresses to a share of the passage: the largest whole percentage that fits is taken. Where even one
    word does not fit, its first k tokens are, and of a text without a word that the classifier knows the first k.

    Args:
        model: folder or hub id of the token classifier.

    Raises:
        CompressorError: llmlingua is not installed, or the classifier cannot be loaded.
    """

    name = "llmlingua2"

    def __init__(self, base: Base, model: str):
        super().__init__(base)
        self.compressor = load_llmlingua(model, str(base.device))
        # Sizes are asked for one after the other and try the same percentages.
        self._kept = lru_cache(maxsize=65_536)(self._keep)

    @classmethod
    def from_settings(cls, base: Base, settings: MethodSettings) -> LLMLingua2:
        return cls(base, settings.llmlingua)

    def choose(self, passage: list[int], tokens: int) -> list[int]:
        if len(passage) <= tokens:
            return passage
        text = self.base.tokenizer.decode(passage, skip_special_tokens=True)
        low, high = 0, 100  # at `low` percent the text fits, at `high` it does not or is the whole passage
        while high - low > 1:
            middle = (low + high) // 2
            if len(self._kept(text, middle)) <= tokens:
                low = middle
            else:
                high = middle
        fitting = self._kept(text, low) if low else ()
        longer = self._kept(text, high) if high < 100 else tuple(passage)
        return list(fitting or longer[:tokens])

    def _keep(self, text: str, percentage: int) -> tuple[int, ...]:
        """Token ids of what is kept of a text at a share from 1 to 99 percent."""
        try:
            kept = self.compressor.compress_prompt([text], rate=percentage / 100)["compressed_prompt"].strip()
        except IndexError:
            return ()  # the classifier's tokenizer knows no word of the text
        return tuple(self.base.tokenise([kept])[0])


def load_llmlingua(model: str, device: str) -> Any:
    """The package's compressor around a token classifier.

    Raises:
        CompressorError: the package is not installed, or model or its data cannot be loaded.
    """
    try:
        from llmlingua import PromptCompressor  # optional
    except ImportError:
        raise lacking("the method llmlingua2", "llmlingua", "llmlingua") from None
    try:
        with bars_on_terminals():
            return PromptCompressor(
                model_name=model, device_map=device, model_config={"trust_remote_code": False}, use_llmlingua2=True
            )
    except Exception as error:  # the hub client and tiktoken raise many kinds
        raise CompressorError(
            f"cannot load LLMLingua-2 with {model!r} ({type(error).__name__}): give a folder or hub id of its token "
            "classifier, for instance microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank; the first use "
            "also downloads a tokenizer of tiktoken"
        ) from None
