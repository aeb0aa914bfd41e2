"""What a source's record becomes: normalised text, the day of its first version, or the reason to drop it."""

from __future__ import annotations

import datetime
import email.utils
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from compressor.data.builders.choice import CorpusConfig
from compressor.data.examples import PUBLISHED_ID
from compressor.data.records import text_field
from compressor.data.rows import BadRecord, Row, type_name

ARXIV_ID = re.compile(r"(?:(\d\d)(\d\d)\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/(\d\d)(\d\d)\d{3})(v\d+)?")

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
_PAPER = r"(?:paper|article|manuscript|submission|preprint|pre-print|e-?print|note|letter|report|version|work|draft)"
_HAS_BEEN = r"(?:has|have|had|is|was|are|were)(?:\s(?:now|since|already|been|being|\w+ly))*"
_GONE = (
    r"['\"]?(?:withdrawn\b|retracted\b(?!\s(?:on)?to\b)"
    r"|removed\b(?=\s(?:by\s(?:the\s)?(?:author|arxiv)|from\s(?:the\s)?ar[xc]|due\b|because\b|at\sthe\srequest)))"
)
_START = (
    r"(?:^|[.!?:;)>*=]\s|[(\[])\W*"
    r"(?:(?:therefore|hence|thus|so|note|notice|update|now|however|unfortunately)\b[,:]?\s(?:that\s)?)*"
)
_WITHDRAWN = re.compile(
    # "This paper (arXiv:0804.0086) has been withdrawn by the authors", "the present article is temporarily withdrawn".
    # What "the paper" is, and not another's, is told by its standing at the beginning of a sentence.
    rf"(?:\b(?:this|my|our)|{_START}the(?:\sabove)?)\s(?:[\w.:/-]+\s){{0,2}}?{_PAPER}"
    rf"(?:\s?\([^)]*\)|,[^.;]{{1,80}},)?\s{_HAS_BEEN}\s{_GONE}"
    rf"|\bthe\spaper\s{_HAS_BEEN}\swithdrawn\s(?:by\sthe\sauthors?\b|from\s(?:the\s)?ar[xc])"
    rf"|\bit\s{_HAS_BEEN}\swithdrawn\sfrom\s(?:the\s)?ar[xc]"
    rf"|\bthis\s{_PAPER}\s(?:[^.;]|\.\d){{0,150}}\band\s(?:so|therefore|hence|thus)(?:\s{_HAS_BEEN})?\swithdrawn\b"
    # "we withdraw this paper", "the authors would like to withdraw the article", "a consensus on withdrawing the paper"
    rf"|\bwithdr(?:aw|awn|ew|awing)\s(?:this|my|our)\s(?:present\s)?{_PAPER}\b"
    rf"|\b(?:we|i|authors?)\s(?:[\w']+\s){{0,5}}?withdr(?:aw|awn|ew|awing)\sthe\s(?:present\s)?{_PAPER}\b"
    # "Manuscript withdrawn because", "(Paper is being withdrawn", "Withdrawn by the author", "WITHDRAWAL NOTICE"
    rf"|(?:^\W*(?:this\W+)?(?:{_PAPER}\s)?|{_START}{_PAPER}\s)(?:{_HAS_BEEN}\s)?(?:temporarily\s)?(?:withdrawn|retracted)"
    r"(?:\W*$|\W*[.:;,)\]]|\s(?:by|due|because|since|as|for|pending|until|effective|at\sthe\srequest)\b)"
    rf"|^\W*(?:{_PAPER}\s)?removed\sby\s(?:the\s)?(?:author|arxiv)|^\W*(?:withdrawal|retraction)\snotice"
    r"|\bwithdrawn\sby\sarxiv\b",
    re.IGNORECASE,
)
_WITHDRAWN_TITLE = re.compile(
    rf"^\W*(?:withdrawn|retracted|retraction|removed)(?:\s{_PAPER})?\s?[:\])]|[(\[](?:withdrawn|retracted)[)\]]\W*$",
    re.IGNORECASE,
)
_WITHDRAWN_COMMENT = re.compile(
    # Comments are of the paper itself, unless they speak of another: "a corrected version of the withdrawn arXiv:..."
    rf"(?<!\bthe\s)(?<!\ba\s)\b(?:withdrawn|retracted)\b"
    rf"(?!\s(?:{_PAPER}\b|arxiv:|[a-z-]+/\d|\d|from\s(?!(?:the\s)?ar[xc])))|\bwithdr(?:ew|awing|aw)\b"
    r"|^\W*withdrawal(?:\W*$|\snotice)",
    re.IGNORECASE,
)
_FLAGS = ("withdrawn", "is_withdrawn", "retracted", "is_retracted")


def read_abstract(row: Row, names: CorpusConfig, first: dict[str, Any], *, default_id: str) -> dict[str, str] | str:
    """Turn a row into a record (id, title, abstract, categories, date), or say why it is dropped.

    Args:
        row: as it was read.
        names: says where the source keeps what.
        first: the first row of the same file. A field that it has must be in every row.
        default_id: the id where the file has none.

    Returns:
        The record; or "empty", "withdrawn" or "example" (the demo's, which nothing may be trained on). Its date is
        yyyy-mm-dd, or yyyy-mm where the source states only the month, or "" if there is none.

    Raises:
        CompressorError: a field is missing or of the wrong type; names file and line.
    """
    abstract = collapse(row.string(text_field(first, names.text_field, row.where)))
    if not abstract:
        return "empty"
    title = row.values.get(names.title_field)
    if withdrawn(abstract, row.values, title=title if isinstance(title, str) else ""):
        return "withdrawn"
    identifier = row.id(names.id_field) if names.id_field in first else default_id
    if identifier.strip().split("v")[0] == PUBLISHED_ID:
        return "example"
    return {
        "id": identifier.strip(),
        "title": collapse(row.string(names.title_field)) if names.title_field in first else "",
        "abstract": abstract,
        "categories": _categories(row, names.categories_field) if names.categories_field in first else "",
        "date": _date(row, names, identifier.strip(), first),
    }


def collapse(text: str) -> str:
    """Runs of whitespace (line breaks too) become one space; control characters go."""
    return " ".join(_CONTROL.sub("", text).split())


def comparable(text: str) -> str:
    """What two spellings of one text share: letters and digits, without case, width or punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[\W_]+", " ", folded).split()) or text


def withdrawn(abstract: str, fields: Mapping[str, Any] | None = None, *, title: str = "") -> bool:
    """Whether a record says that its paper was withdrawn (and not that it is about papers that were).

    Fields that say so decide alone: a flag (OpenAlex's `is_retracted`), a `status`, the last version's source type I of
    arXiv's raw metadata. Then title, comments and abstract are read, each with the patterns of how it is said there.
    """
    fields = fields or {}
    if any(fields.get(name) is True for name in _FLAGS):
        return True
    if str(fields.get("status", "")).strip().lower() in ("withdrawn", "retracted"):
        return True
    versions = fields.get("versions")
    last = versions[-1] if isinstance(versions, list) and versions else None
    if isinstance(last, dict) and "I" in str(last.get("source_type") or ""):
        return True
    comments = fields.get("comments")
    return bool(
        _WITHDRAWN_TITLE.search(collapse(title))
        or (isinstance(comments, str) and _WITHDRAWN_COMMENT.search(collapse(comments)))
        or _WITHDRAWN.search(abstract)
    )


def base_id(identifier: str) -> str:
    """An arXiv id without its version ("2301.00001v2" is "2301.00001"); other ids as they are."""
    match = ARXIV_ID.fullmatch(identifier)
    return identifier[: match.start(5)] if match and match.group(5) else identifier


def month_of_id(identifier: str) -> str:
    """The month that an arXiv id states (yyyy-mm); "" for any other id."""
    match = ARXIV_ID.fullmatch(identifier)
    if not match:
        return ""
    year, month = match.group(1) or match.group(3), match.group(2) or match.group(4)
    if not 1 <= int(month) <= 12:
        return ""
    # arXiv began in 1991.
    return f"{'19' if int(year) >= 91 else '20'}{year}-{month}"


def _categories(row: Row, field: str) -> str:
    value = row.values.get(field)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return collapse(" ".join(value))
    return collapse(row.string(field))


def _date(row: Row, names: CorpusConfig, identifier: str, first: dict[str, Any]) -> str:
    if names.date_field is not None:
        if names.date_field not in row.values:
            row.string(names.date_field)  # raises: the field is missing
        return _day(row, names.date_field, row.date(names.date_field))
    if "versions" in first:
        return _first_version(row)
    for field in ("date", "created"):
        if field in first:
            if field not in row.values:
                row.string(field)
            return _day(row, field, row.date(field))
    return month_of_id(identifier)


def _first_version(row: Row) -> str:
    versions = row.values.get("versions")
    if not isinstance(versions, list) or not versions or not all(isinstance(item, dict) for item in versions):
        got = "missing" if "versions" not in row.values else type_name(versions)
        raise BadRecord(
            f"{row.where}: the field 'versions' must be a list like [{{'version': 'v1', 'created': ...}}] "
            f"but is {got if versions != [] else 'empty'}; or name the field of the date (date_field)"
        )
    v1 = next((item for item in versions if item.get("version") == "v1"), versions[0])
    return _day(row, "versions[].created", row._replace(values=v1).string("created"))


def _day(row: Row, field: str, value: str) -> str:
    """yyyy-mm-dd, or yyyy-mm, from an ISO or RFC 822 date or an arXiv id; "" stays."""
    value = value.strip()
    if not value:
        return ""
    try:
        if re.match(r"\d{4}-\d\d-\d\d($|[T ])", value):
            return datetime.date.fromisoformat(value[:10]).isoformat()
        if re.fullmatch(r"\d{4}-\d\d", value):
            return datetime.date.fromisoformat(f"{value}-01").isoformat()[:7]
        if month := month_of_id(value):
            return month
        moment = email.utils.parsedate_to_datetime(value)
        utc = moment if moment.tzinfo is None else moment.astimezone(datetime.timezone.utc)
        return utc.date().isoformat()
    except (ValueError, TypeError, IndexError, OverflowError):
        raise BadRecord(
            f"{row.where}: the field {field!r} holds {value[:60]!r}, which is no date like 2024-01-31 or "
            "'Wed, 31 Jan 2024 10:00:00 GMT'"
        ) from None
