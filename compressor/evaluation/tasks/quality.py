"""How well a memory holds its passage, known without decoding it: the passage's likelihood under its own memory."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.methods.interface import Method, Piece
from compressor.model.fidelity import passage_scores


def passage_nats(method: Method, contexts: Sequence[Sequence[Piece]]) -> list[float | None]:
    """Negative log-likelihood of each passage under its own memory, nats a token, EOS included.

    Pieces that occur more than once (several questions about one passage) are scored once. None where a piece and what
    stands for it do not fit together into the base's positions.
    """
    most = method.base.positions
    pieces = list({id(piece): piece for row in contexts for piece in row}.values())
    if most is not None:
        pieces = [piece for piece in pieces if method.reach([piece]) + 2 + len(piece.ids) <= most]
    if not pieces:
        return [None] * len(contexts)
    prefix = method.prefix([[piece] for piece in pieces])
    scored = passage_scores(method.base, prefix, [piece.ids for piece in pieces])
    found = {id(piece): (-float(one[:, 0].double().sum()), len(one)) for piece, one in zip(pieces, scored, strict=True)}
    nats: list[float | None] = []
    for row in contexts:
        scores = [found[id(piece)] for piece in row if id(piece) in found]
        tokens = max(1, sum(count for _, count in scores))
        nats.append(sum(one for one, _ in scores) / tokens if len(scores) == len(row) else None)
    return nats
