"""Building a corpus: normalising, dropping, splitting by date, shards, samples, and the command."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from compressor.commands.cli import main
from compressor.data.builders.abstracts import collapse, comparable, month_of_id, withdrawn
from compressor.data.builders.choice import CorpusConfig, SampleConfig
from compressor.data.builders.corpora import build_corpus, even_shares
from compressor.data.records import load_texts
from compressor.errors import CompressorError
from compressor.files import sha256
from compressor.parsing import parse_config

RECIPES = (Path(__file__).resolve().parents[1] / "configs" / "corpora").glob("*.yaml")
CONFIGS = sorted(path for path in RECIPES if not path.stem.startswith("arxivqa"))  # test_config.py parses those


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def words(seed: str, count: int = 25) -> str:
    return " ".join(f"{seed}{place}" for place in range(count))


def paper(identifier: str, created: str = "Mon, 2 Jan 2023 19:18:42 GMT", **fields: Any) -> dict[str, Any]:
    """A record as in arXiv's snapshot, made up for the test."""
    return {
        "id": identifier,
        "title": f"On\n  {identifier}",
        "comments": None,
        "abstract": f"  {words(identifier)}\n",
        "categories": "cs.CL cs.LG",
        "versions": [
            {"version": "v1", "created": created},
            {"version": "v2", "created": "Mon, 1 Jan 2035 00:00:00 GMT"},
        ],
        "update_date": "2035-01-01",
        **fields,
    }


def snapshot(path: Path, *papers: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in papers))
    return str(path)


def build(tmp_path: Path, source: Any, **options: Any) -> dict[str, Any]:
    return build_corpus(CorpusConfig(source=source, output=str(tmp_path / "out"), **options))


def rows(tmp_path: Path, split: str) -> list[dict[str, str]]:
    files = sorted((tmp_path / "out").glob(f"{split}-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def leftovers(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


def test_splits_by_the_day_of_the_first_version(tmp_path: Path) -> None:
    days = {
        "a": ("Fri, 30 Jun 2023 23:59:59 GMT", "train"),
        "b": ("Sat, 1 Jul 2023 00:00:00 GMT", "validation"),
        "c": ("Sun, 31 Dec 2023 23:59:59 GMT", "validation"),
        "d": ("Mon, 1 Jan 2024 00:00:00 GMT", "test"),
        "e": ("Tue, 30 Apr 2024 23:59:59 GMT", "test"),
        "f": ("Wed, 1 May 2024 00:00:00 GMT", None),
        # Still June in the time zone it is written in, but July in UTC, which arXiv uses.
        "g": ("Fri, 30 Jun 2023 22:00:00 -0400", "validation"),
    }
    source = snapshot(tmp_path / "s.json", *[paper(name, day) for name, (day, _) in days.items()])
    manifest = build(tmp_path, source)
    for split in ("train", "validation", "test"):
        wanted = [name for name, (_, where) in days.items() if where == split]
        assert [row["id"] for row in rows(tmp_path, split)] == wanted
    assert manifest["dropped"] == {"after_test": 1}
    assert manifest["splits"]["validation"]["dates"] == {"first": "2023-07-01", "last": "2023-12-31"}
    assert rows(tmp_path, "test")[0] == {
        "id": "d",
        "title": "On d",
        "abstract": words("d"),
        "categories": "cs.CL cs.LG",
        "date": "2024-01-01",
    }


def test_drops_withdrawn_empty_short_long_and_double(tmp_path: Path) -> None:
    source = snapshot(
        tmp_path / "s.jsonl",
        paper("2301.00001"),
        paper("2301.00001v2", abstract=words("other")),
        # The same text in other dress, and in another split.
        paper("x", "Mon, 1 Jan 2024 00:00:00 GMT", abstract=words("2301.00001").upper().replace(" ", ",\n")),
        paper("w", abstract="This paper has been withdrawn by the authors. " + words("w")),
        paper("c", comments="This submission has been withdrawn by arXiv administrators"),
        paper("e", abstract=" \n "),
        paper("s", abstract="too short"),
        paper("l", abstract=words("l", 41)),
        paper("k", abstract=words("k", 40)),
        paper("2403.01735v2", abstract=words("of the demo's example")),
    )
    manifest = build(tmp_path, source, max_words=40)
    assert [row["id"] for row in rows(tmp_path, "train")] == ["2301.00001", "k"]
    assert manifest["read"] == 10
    assert manifest["dropped"] == {
        "duplicate_id": 1,
        "duplicate_text": 1,
        "empty": 1,
        "example": 1,
        "too_long": 1,
        "too_short": 1,
        "withdrawn": 2,
    }
    assert sum(manifest["kept"].values()) + sum(manifest["dropped"].values()) == manifest["read"]


def test_a_dropped_record_does_not_make_its_twin_a_double(tmp_path: Path) -> None:
    late = paper("a", "Mon, 1 Jan 2035 00:00:00 GMT")
    manifest = build(tmp_path, snapshot(tmp_path / "s.json", late, paper("a")))
    assert manifest["kept"]["train"] == 1


WITHDRAWN = [
    "This paper has been withdrawn by the author due to an error in section 3.",
    "We prove it. The present article is temporarily withdrawn.",
    "Withdrawn.",
    "Withdrawn by the author because of an error in Lemma 2.",
    "(Withdrawn) Collaborative security initiatives are advocated.",
    "WITHDRAWAL NOTICE This paper has been withdrawn.",
    "We would like to withdraw this article for the following reasons",
    "The authors would like to withdraw this version.",
    "So at this time we prefer to withdraw the paper about the averages.",
    "Therefore we reach a consensus on withdrawing the paper until the data is available.",
    "UPDATE: Manuscript withdrawn, because results are incorrect.",
    "We compute it. (Paper is being withdrawn: the original conclusion is incorrect.)",
    'We find a family. The paper is currently "withdrawn", since a mistake has been discovered.',
    "It was shown by Chung. However, the paper has been withdrawn because the bound was known.",
    'This paper ("Two-Level Chromophore", which can be found at arXiv:0804.0086) has been withdrawn by the author.',
    "Because of changes to the model proposed in the paper, it has been withdrawn from the archive.",
    "This paper has been removed by the author due to a misstatement in Theorem 1.",
    "Removed by arXiv administration. This article was plagiarized.",
    "Our paper was retracted.",
    "This paper has flaws in the construction of Theorem 11.1 in Part II and so withdrawn.",
]
NOT_WITHDRAWN = [
    "We study the withdrawal of liquid from a reservoir in this paper.",
    "Both papers should be retracted. We analyse 604 retracted articles.",
    "One planned to withdraw the affected paper, while another defended it.",
    "Utilizing papers withdrawn from arXiv, we validate the method.",
    "Withdrawn papers on arXiv are studied. This paper asks why.",
    "This paper studies how consent that was given can be withdrawn.",
    "In this work we show that heat is withdrawn by the bath.",
    "We report a case in which the paper was retracted for fraud.",
    "Superfluid atoms are injected (withdrawn) into (from) a chamber.",
    "This paper retrieves correct parts of the withdrawn paper arXiv:math/0607470.",
    "This letter is removed from the alphabet, and the word stays in the language.",
    "This work is retracted onto the subspace.",
    "after completion of which this manuscript will be withdrawn.",
    "We ask why the authors of a preprint withdraw their results.",
]


@pytest.mark.parametrize(
    ("text", "expected"), [*((text, True) for text in WITHDRAWN), *((text, False) for text in NOT_WITHDRAWN)]
)
def test_abstracts_that_say_that_they_were_withdrawn(text: str, expected: bool) -> None:
    assert withdrawn(text) is expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"comments": "Withdrawn"}, True),
        ({"comments": "This submission has been withdrawn by arXiv administrators"}, True),
        ({"comments": "12 pages. Paper withdrawn due to an error in (3)"}, True),
        ({"comments": "The authors withdrew it: Lemma 2 is wrong"}, True),
        ({"comments": "retracted, see arXiv:1003.0167"}, True),
        ({"comments": "A corrected version of the withdrawn arXiv:0710.1234"}, False),
        ({"comments": "Replaces withdrawn paper 0710.1234"}, False),
        ({"comments": "8 pages; withdrawn from ICML, now at NeurIPS"}, False),
        ({"comments": "On the withdrawal of troops"}, False),
        ({"comments": None}, False),
        ({"title": "WITHDRAWN: A proof of everything"}, True),
        ({"title": "[Retracted] A proof of everything"}, True),
        ({"title": "The Road Coloring for Mapping on k States (withdrawn)"}, True),
        ({"title": "Withdrawn papers on arXiv"}, False),
        ({"title": "Retraction notices: a study"}, False),
        ({"is_retracted": True}, True),
        ({"is_retracted": False}, False),
        ({"withdrawn": True}, True),
        ({"status": "Withdrawn"}, True),
        ({"status": "published"}, False),
        ({"versions": [{"version": "v1"}, {"version": "v2", "source_type": "I"}]}, True),
        ({"versions": [{"version": "v1", "source_type": "I"}, {"version": "v2", "source_type": "D"}]}, False),
    ],
)
def test_fields_that_say_that_a_paper_was_withdrawn(fields: dict[str, Any], expected: bool) -> None:
    assert withdrawn("An abstract about something else.", fields, title=fields.get("title", "")) is expected


def test_normalising() -> None:
    assert collapse("  a\n\tb\u00a0c\x00\x1fd ") == "a b c d"
    assert comparable("The  \N{LATIN SMALL LIGATURE FI}ne-tuned MODEL.") == "the fine tuned model"
    assert comparable("++") == "++"
    assert month_of_id("hep-th/9901001v3") == "1999-01"
    assert month_of_id("math.GT/0309136") == "2003-09"
    assert month_of_id("2604.12345") == "2026-04"
    assert month_of_id("2613.12345") == month_of_id("7") == ""


def test_files_and_manifest_agree_and_datasets_reads_the_folder(tmp_path: Path) -> None:
    source = snapshot(tmp_path / "s.json", *[paper(f"p{n}") for n in range(25)], paper("v", "1 Aug 2023 00:00"))
    manifest = build(tmp_path, source, licence="CC0-1.0")
    (shard,) = manifest["splits"]["train"]["shards"]
    assert shard["records"] == 25
    assert shard["sha256"] == sha256(tmp_path / "out" / shard["file"])
    assert shard["bytes"] == (tmp_path / "out" / shard["file"]).stat().st_size
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["licence"] == "CC0-1.0"
    assert str(tmp_path) not in json.dumps(manifest)
    assert len(datasets.load_dataset(str(tmp_path / "out"), split="train")) == 25
    assert len(load_texts(tmp_path / "out", split="train")) == 25
    with pytest.raises(CompressorError, match="choose one of train, validation"):
        load_texts(tmp_path / "out")


def test_every_kind_of_file_gives_the_same_corpus(tmp_path: Path) -> None:
    records = [{"id": f"{n}", "text": words(f"t{n}"), "date": f"2023-01-0{n}"} for n in (1, 2)]
    table = datasets.Dataset.from_list(records)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.to_csv(str(tmp_path / "a.csv"), index=False)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps(records))
    found = []
    for name in ("a.parquet", "a.csv", "a.jsonl.gz", "a.json"):
        config = CorpusConfig(source=str(tmp_path / name), output=str(tmp_path / "out"))
        build_corpus(config, overwrite=True)
        found.append(rows(tmp_path, "train"))
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0][0]["title"] == ""
    (tmp_path / "a.txt").write_text(words("x") + "\n\n" + words("y") + "\n")
    with pytest.raises(CompressorError, match=r"a\.txt line 1 has no date"):
        build_corpus(CorpusConfig(source=str(tmp_path / "a.txt"), output=str(tmp_path / "txt")))
    manifest = build_corpus(CorpusConfig(source=str(tmp_path / "a.txt"), output=str(tmp_path / "txt"), undated="train"))
    assert manifest["kept"]["train"] == 2


def test_a_hub_data_set_is_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    content = datasets.Dataset.from_list(
        [{"key": f"2301.0000{n}", "body": words(f"b{n}"), "categories": ["cs.CL", "cs.LG"]} for n in (1, 2)]
    )

    def load(name: str, config: str | None, *, split: str | None, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        return content.to_iterable_dataset() if streaming else content

    monkeypatch.setattr("datasets.load_dataset", load)
    build(tmp_path, "owner/name:sub", hub_split="all", id_field="key", text_field="body", date_field="key")
    assert asked == [("owner/name", "sub", "all", True)]
    assert rows(tmp_path, "train")[0] == {
        "id": "2301.00001",
        "title": "",
        "abstract": words("b1"),
        "categories": "cs.CL cs.LG",
        "date": "2023-01-01",
    }


def test_dates_that_state_only_the_month(tmp_path: Path) -> None:
    source = tmp_path / "s.jsonl"
    source.write_text(
        "".join(
            json.dumps({"id": f"{n}", "abstract": words(f"t{n}"), "date": date}) + "\n"
            for n, date in enumerate(["2022-12", "2023-06", "2023-07-31"])
        )
    )
    manifest = build(tmp_path, str(source), train_before="2023-06-15")
    assert [row["date"] for row in rows(tmp_path, "train")] == ["2022-12-01"]
    assert manifest["month_dates"] == {"train": 1, "validation": 0, "test": 0}
    # June holds the cut: the record could be on either side of it.
    assert manifest["dropped"] == {"month_holds_a_cut": 1}


def test_what_a_source_holds_out_stays_held_out(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    snapshot(folder / "train-00000.jsonl", paper("a"), paper("twin", abstract=words("t")))
    test_day = "Mon, 1 Jan 2024 00:00:00 GMT"
    snapshot(folder / "test.jsonl", paper("old"), paper("new", test_day), paper("x", test_day, abstract=words("t")))
    manifest = build(tmp_path, str(folder), keep_source_splits=True)
    assert [row["id"] for row in rows(tmp_path, "train")] == ["a"]
    assert [row["id"] for row in rows(tmp_path, "test")] == ["new", "x"]
    assert manifest["dropped"] == {"date_of_other_split": 1, "duplicate_text": 1}


def test_samples_do_not_depend_on_order_and_balance_archives(tmp_path: Path) -> None:
    archives = ["cs.CL"] * 60 + ["math.ST"] * 30 + ["hep-th"] * 4
    papers = [paper(f"p{n}", categories=name) for n, name in enumerate(archives)]
    sample = SampleConfig(train=24, balance=["train"])
    build(tmp_path, snapshot(tmp_path / "a.json", *papers), sample=sample)
    first = rows(tmp_path, "train")
    counts = [sum(row["categories"] == name for row in first) for name in ("cs.CL", "math.ST", "hep-th")]
    assert counts == [10, 10, 4]
    config = CorpusConfig(
        source=snapshot(tmp_path / "b.json", *reversed(papers)), output=str(tmp_path / "out"), sample=sample
    )
    build_corpus(config, overwrite=True)
    assert rows(tmp_path, "train") == first
    sample = SampleConfig(train=24, seed=1)
    build_corpus(CorpusConfig(source=config.source, output=str(tmp_path / "out"), sample=sample), overwrite=True)
    assert rows(tmp_path, "train") != first
    with pytest.raises(CompressorError, match=r"sample.train = 95 but the split has only 94"):
        build_corpus(CorpusConfig(source=config.source, output=str(tmp_path / "more"), sample=SampleConfig(train=95)))


def test_even_shares() -> None:
    assert even_shares({"a": 100, "b": 1, "c": 100}, 10) == {"b": 1, "a": 4, "c": 5}
    assert even_shares({"a": 2, "b": 1}, 10) == {"a": 2, "b": 1}
    assert even_shares({}, 3) == {}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('{"id": "b", "abs', "line 2 is not valid JSON"),
        ("[1]", "line 2 is a list, not an object"),
        ({"abstract": None}, "line 2: the field 'abstract' must be text but is null"),
        ({"abstract": 3}, "line 2: the field 'abstract' must be text but is a number"),
        ({"id": 704.0001}, "line 2: the id 704.0001 is a number"),
        ({"versions": []}, "line 2: the field 'versions' must be a list .* but is empty"),
        ({"versions": "v1"}, "line 2: the field 'versions' must be a list .* but is text"),
        ({"versions": [{"version": "v1"}]}, "line 2: the field 'created' is missing"),
        ({"versions": [{"created": "sometime"}]}, "line 2: .* holds 'sometime', which is no date"),
        ({"categories": 3}, "line 2: the field 'categories' must be text"),
        *[
            (field, f"line 2: the field '{field}' (is missing|must be a list)")
            for field in ("id", "title", "abstract", "categories", "versions")
        ],
    ],
)
def test_a_broken_line_is_named_and_nothing_is_left(tmp_path: Path, broken: Any, message: str) -> None:
    second = paper("b")
    if isinstance(broken, dict):
        line = json.dumps({**second, **broken})
    elif broken in second:
        line = json.dumps({name: value for name, value in second.items() if name != broken})
    else:
        line = broken
    source = tmp_path / "s.json"
    source.write_text(json.dumps(paper("a")) + "\n" + line + "\n")
    with pytest.raises(CompressorError, match=message) as caught:
        build(tmp_path, str(source))
    assert str(source) in str(caught.value)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"\x7fELF\x00\x01\x02\x03" * 99, bytes(range(128, 256))])
def test_empty_files_and_junk(tmp_path: Path, content: bytes) -> None:
    for name in ("s.json", "s.csv", "s.parquet", "s.jsonl.gz", "s.txt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CompressorError, match=name):
            build(tmp_path, str(tmp_path / name), undated="train")
        assert leftovers(tmp_path) == []


def test_nothing_kept_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match=r"no record was kept of 1 \(dropped: too_short 1\)"):
        build(tmp_path, snapshot(tmp_path / "s.json", paper("a", abstract="short")))


def test_an_output_is_replaced_only_if_asked_and_only_if_it_is_a_corpus(tmp_path: Path) -> None:
    source = snapshot(tmp_path / "s.json", paper("a"))
    build(tmp_path, source)
    with pytest.raises(CompressorError, match=r"exists already and holds a corpus: .* give --overwrite"):
        build(tmp_path, source)
    config = CorpusConfig(source=source, output=str(tmp_path / "out"))
    broken = CorpusConfig(source=str(tmp_path / "none.json"), output=config.output)
    with pytest.raises(CompressorError, match="is not there"):
        build_corpus(broken, overwrite=True)
    assert len(rows(tmp_path, "train")) == 1
    build_corpus(config, overwrite=True)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(CompressorError, match="is not a corpus"):
        build_corpus(CorpusConfig(source=source, output=str(precious)), overwrite=True)
    assert (precious / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ""}, "source is not given: it must be a file"),
        ({"output": ""}, "output is not given"),
        ({"min_words": -1}, "min_words = -1 is out of range: it must be at least 0"),
        ({"max_words": 5}, "max_words = 5 is out of range: it must be at least min_words = 20"),
        ({"train_before": "soon"}, "train_before = 'soon' is not a date"),
        ({"train_before": "20230701"}, "train_before = '20230701' is not a date"),
        ({"train_before": "2024-13"}, "train_before = '2024-13' is not a date"),
        ({"train_before": "2024-02"}, "validation_before = '2024-01'"),
        ({"test_until": "2023-11"}, "test_until = '2023-11'"),
    ],
)
def test_settings_are_validated(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressorError, match=message):
        CorpusConfig(**{"source": "x", "output": "y", **options})


def test_cuts_take_months_and_days() -> None:
    config = CorpusConfig(source="x", output="y", test_until="2024-12")
    assert config.cuts() == ("2023-07-01", "2024-01-01", "2025-01-01")
    config = CorpusConfig(source="x", output="y", train_before="2023-07-15", test_until="2024-02-29")
    assert config.cuts() == ("2023-07-15", "2024-01-01", "2024-03-01")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_valid(path: Path) -> None:
    config, _ = parse_config(CorpusConfig, ["--config", str(path)], "")
    assert config.licence != "unknown"
    if path.stem == "arxiv-snapshot":
        assert config.cuts() == ("2023-07-01", "2024-01-01", "2024-05-01")
    if path.stem == "arxiv-2026":
        assert config.cuts() == ("2026-01-01", "2026-02-01", "2026-05-01")


def test_the_command_builds_and_the_command_line_wins(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = snapshot(tmp_path / "s.json", *[paper(f"p{n}") for n in range(3)])
    config = next(str(path) for path in CONFIGS if path.stem == "arxiv-snapshot")
    output = tmp_path / "out"
    command = [
        "corpus",
        "--config",
        config,
        "--source",
        source,
        "--output",
        str(output),
        "--sample.train",
        "2",
    ]
    assert main(command) == 0
    assert "train: 2 records" in capsys.readouterr().out
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([*command, "--overwrite"]) == 0


def test_unknown_keys_and_commands_name_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "c.yaml").write_text("min_word: 3\n")
    for arguments, hint in (
        (["corpus", "--config", str(tmp_path / "c.yaml")], "did you mean min_words?"),
        (["corpus", "--sauce", "x"], "did you mean source?"),
        (["corpsu"], "did you mean corpus?"),
    ):
        assert main(arguments) == 2
        assert hint in capsys.readouterr().err


def test_the_process_ends_with_status_2_and_no_traceback(tmp_path: Path, program: Callable[..., Any]) -> None:
    (tmp_path / "s.jsonl").write_bytes(b"\xfa\xfe junk")
    command = ("-m", "compressor", "corpus", "--source", "s.jsonl", "--output", "out")
    status, _, errors = program(*command, cwd=tmp_path, PATH="")
    assert status == 2
    assert errors.startswith("error: s.jsonl line 1")
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]
