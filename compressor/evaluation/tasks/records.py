"""Records of the tasks that need more than a passage: rows of a file, a shipped set or the hub, by their fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from compressor.data.bad_records import BadRecords
from compressor.data.left_out import LeftOut
from compressor.data.records import load_hub, text_value
from compressor.data.sources import Hub, Row, read_rows, resolve
from compressor.errors import CompressorError

if TYPE_CHECKING:
    from compressor.evaluation.settings import EvaluationConfig

T = TypeVar("T")

HUB_SPLITS = {
    "allenai/csabstruct": "test",
    "stanfordnlp/sst2": "validation",  # the labels of its test part are not public
    "nyu-mll/glue": "test",
}
"""Splits of hub data sets that are evaluated on where none is named."""


def task_records(
    source: str, config: EvaluationConfig, needs: str, convert: Callable[[Row], T], left_out: LeftOut
) -> list[T]:
    """What `convert` makes of the first `limit` rows of a source; class numbers become the names of the classes.

    Args:
        needs: what the task reads and where to get it, for the message when nothing can be read.

    Raises:
        CompressorError: the source is not there, or a record is broken.
    """
    bad = BadRecords(config.skip_bad_records, left_out)
    try:
        found = list(islice(bad.usable(_task_rows(source, config.split, bad), convert), config.limit))
    except CompressorError as error:
        raise error if needs in str(error) else CompressorError(f"{error}. {needs}") from None
    bad.finish(source, config.limit is not None)
    return found


def _task_rows(source: str, split: str | None, bad: BadRecords) -> Iterator[Row]:
    for place in resolve(source, split=split):
        if isinstance(place, Hub):
            yield from _hub_rows(place, split or HUB_SPLITS.get(place.name))
        else:
            yield from read_rows(place, bad=bad)


def _hub_rows(place: Hub, split: str | None) -> Iterator[Row]:
    loaded = load_hub(place, split)
    classes = {name: _class_names(feature) for name, feature in loaded.features.items()}
    for number, values in enumerate(loaded, start=1):
        named = {name: _named(value, classes[name]) for name, value in values.items()}
        yield Row(number, f"{place.name} row {number}", named)


def _class_names(feature: Any) -> list[str] | None:
    """Names of a column of classes, or of lists of them; None for other columns."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def _named(value: Any, classes: Sequence[str] | None) -> Any:
    if classes is None or value is None:
        return value
    if isinstance(value, list):
        return [_named(one, classes) for one in value]
    return classes[value] if 0 <= value < len(classes) else value


def field_of(row: Row, names: Sequence[str], needs: str) -> str:
    """The first of the names that the row has a field of.

    Raises:
        CompressorError: it has none of them.
    """
    for name in names:
        if name in row.values:
            return name
    fields = ", ".join(map(repr, row.values)) or "none"
    wanted = " or ".join(map(repr, names))
    raise CompressorError(f"{row.where}: there is no field {wanted}; its fields are {fields}. {needs}")


def texts_of(row: Row, name: str) -> list[str]:
    """The texts of a field that holds one or a list of them."""
    value = row.values[name]
    if not isinstance(value, list):
        return [text_value(row, name)]
    if not value:
        raise CompressorError(f"{row.where}: the field {name!r} is empty")
    return [
        text_value(Row(row.number, row.where, {f"{name}[{i}]": one}), f"{name}[{i}]") for i, one in enumerate(value)
    ]
