"""Text codecs that send words: keywords or a summary, after which the base goes on.

Each text is cut into pieces of at most `PIECE` tokens, which are sent and written apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressor.base import Base
from compressor.codecs.blocks import Damaged, varint
from compressor.codecs.text import MOST_PIECES, MOST_TOKENS, TextCodec
from compressor.codecs.text_codecs import Reader
from compressor.codecs.token_coder import decode_tokens, encode_tokens
from compressor.errors import CompressorError
from compressor.generation import Sampling
from compressor.memory import empty_prefix
from compressor.methods.interface import TextMethod

PIECE = 480
"""Most tokens of a text that one prompt stands for."""
DEFAULT_TOKENS = 16


def _pieces(base: Base, text: str, most: int) -> list[list[int]]:
    """Token ids of the text, in the fewest pieces of at most `most`, as equal as can be."""
    ids = base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = -(-len(ids) // most)
    return [list(ids[len(ids) * i // count : len(ids) * (i + 1) // count]) for i in range(count)]


@dataclass(frozen=True)
class Prompt:
    """What stands for a piece of a text: a prompt, and how long the piece was."""

    ids: list[int]
    length: int


class PromptCodec(TextCodec):
    """A prompt that the base continues. Its tokens are coded under the base, as `compressor pack` codes text.

    The text begins with what was sent: the template from `{prompt}` on, filled, then what the base writes.
    """

    template: str
    """Prompt around what was chosen, with `{prompt}` in it."""
    sampling = Sampling(temperature=0.7, top_p=0.9)

    def method(self) -> TextMethod:
        """What chooses the prompt."""
        raise NotImplementedError

    def prepare(self, texts: Sequence[str]) -> list[tuple[str, list[Prompt]]]:
        """The template, and a prompt for each piece of each text."""
        base, tokens = self.needs.exact.base, self.needs.tokens or DEFAULT_TOKENS
        template = self.needs.template or self.template
        if "{prompt}" not in template or tokens < 1:
            raise CompressorError(f"the template {template!r} needs {{prompt}} in it, and tokens ({tokens}) at least 1")
        cut = [_pieces(base, text, PIECE) for text in texts]
        flat = [piece for pieces in cut for piece in pieces]
        chosen = iter(self.method().compress(flat, [tokens])[0])
        return [(template, [Prompt(list(next(chosen)[0].held), len(piece)) for piece in pieces]) for pieces in cut]

    def encode(self, prepared: tuple[str, list[Prompt]]) -> bytes:
        """See `TextCodec.encode`."""
        template, prompts = prepared
        # The codec's own template is not sent.
        shown = b"" if template == self.template else template.encode()
        body = varint(len(shown)) + shown + varint(len(prompts))
        coded = encode_tokens(self.needs.exact, None, [prompt.ids for prompt in prompts])
        for prompt, data in zip(prompts, coded, strict=True):
            body += varint(prompt.length) + varint(len(data)) + data
        return body

    def decode(self, bodies: Sequence[bytes], sampling: Sampling) -> list[str]:
        """See `TextCodec.decode`."""
        base = self.needs.exact.base
        owners, templates, limits, coded = [], [], [], []
        for owner, body in enumerate(bodies):
            reader = Reader(body)
            template = reader.bytes(reader.number(0, 1 << 16)).decode("utf-8", "strict") or self.template
            if "{prompt}" not in template:
                raise Damaged("its template has no place for the prompt")
            for _ in range(reader.number(1, MOST_PIECES)):
                owners.append(owner)
                templates.append(template)
                limits.append(reader.number(1, MOST_TOKENS))
                coded.append(reader.bytes(reader.number(1, 1 << 20)))
            reader.end()
        prompts = decode_tokens(self.needs.exact, None, coded, self.needs.batch, [MOST_TOKENS] * len(coded))
        shown = [
            template.replace("{prompt}", base.tokenizer.decode(ids, skip_special_tokens=True))
            for template, ids in zip(templates, prompts, strict=True)
        ]
        encoded = base.tokenizer(shown, add_special_tokens=False, verbose=False)["input_ids"]
        asked = [[base.bos, *ids] for ids in encoded]
        texts = [""] * len(bodies)
        # What was sent and what is written are together about as long as the piece was.
        limits = [max(8, limit - len(ids)) for limit, ids in zip(limits, encoded, strict=True)]
        found = self.write(empty_prefix(base, len(asked)), asked, limits, sampling)
        for owner, template, prompt, ids in zip(owners, templates, shown, found, strict=True):
            sent = prompt[template.index("{prompt}") :]
            texts[owner] += ("\n" if texts[owner] else "") + sent + base.tokenizer.decode(ids, skip_special_tokens=True)
        return texts

    def decoder_tokens(self, prepared: tuple[str, list[Prompt]]) -> int:
        return sum(len(prompt.ids) for prompt in prepared[1])


class KeywordsCodec(PromptCodec):
    """The text's keywords, and what the base writes after them."""

    name, number = "keywords", 1
    template = "{prompt}\n"

    def method(self) -> TextMethod:
        from compressor.methods.keywords import Keywords

        return Keywords(self.needs.exact.base, self.needs.keyword_language)


class SummaryCodec(PromptCodec):
    """A summary, extracted or written by a summariser, and what the base writes after it."""

    name, number = "summary", 2
    template = "{prompt}\n"

    def method(self) -> TextMethod:
        from compressor.methods.summary import Summary

        return Summary(self.needs.exact.base, self.needs.summariser)
