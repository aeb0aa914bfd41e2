"""How well a memory holds its passage, known without decoding it: the passage's likelihood under its own memory."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.generation import score
from compressor.methods.interface import Method, Piece, after


def passage_nats(method: Method, contexts: Sequence[Sequence[Piece]]) -> list[float]:
    """Negative log-likelihood of each passage under its own memory, nats a token, EOS included.

    Pieces that occur more than once (several questions about one passage) are scored once.
    """
    base = method.base
    pieces = list({id(piece): piece for row in contexts for piece in row}.values())
    prefix = method.prefix([[piece] for piece in pieces])
    prompts = after(base, prefix, [[base.bos]] * len(pieces))
    with method.decoding():
        scored = score(base, prefix, prompts, [[*piece.ids, base.eos] for piece in pieces])
    found = {id(piece): (-float(one[:, 0].double().sum()), len(one)) for piece, one in zip(pieces, scored, strict=True)}
    totals = [[found[id(piece)] for piece in row] for row in contexts]
    return [sum(nats for nats, _ in row) / max(1, sum(count for _, count in row)) for row in totals]
