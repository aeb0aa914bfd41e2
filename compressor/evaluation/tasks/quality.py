"""How well a memory holds its passage, known without decoding it: the passage's likelihood under its own memory."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.fidelity import passage_scores
from compressor.methods.interface import Method, Piece


def passage_nats(method: Method, contexts: Sequence[Sequence[Piece]]) -> list[float]:
    """Negative log-likelihood of each passage under its own memory, nats a token, EOS included.

    Pieces that occur more than once (several questions about one passage) are scored once.
    """
    pieces = list({id(piece): piece for row in contexts for piece in row}.values())
    prefix = method.prefix([[piece] for piece in pieces])
    with method.decoding():
        scored = passage_scores(method.base, prefix, [piece.ids for piece in pieces])
    found = {id(piece): (-float(one[:, 0].double().sum()), len(one)) for piece, one in zip(pieces, scored, strict=True)}
    totals = [[found[id(piece)] for piece in row] for row in contexts]
    return [sum(nats for nats, _ in row) / max(1, sum(count for _, count in row)) for row in totals]
