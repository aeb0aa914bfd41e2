"""Settings: YAML below the command line, checks before anything heavy is loaded, messages that name the key."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.commands.cli import main
from compressor.commands.options import DemoConfig
from compressor.data.builders.arxivqa import ArxivQAConfig
from compressor.data.builders.choice import CorpusConfig
from compressor.data.config import LengthRange
from compressor.errors import CompressorError
from compressor.model.config import CompressorConfig
from compressor.parsing import RENAMED, parse_config, settings_of
from compressor.training.config import RunConfig, TokensShare

PROJECT = Path(__file__).resolve().parents[1]
CONFIGS = PROJECT / "configs"
OTHERS = ("accelerate", "corpora", "tasks")
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.relative_to(CONFIGS).parts[0] not in OTHERS)


def parse(*argv: str) -> RunConfig:
    return parse_config(RunConfig, list(argv), "test")[0]


def write(path: Path, **content: Any) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


# -- files that ship -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_run_configuration_parses_and_says_something(path: Path) -> None:
    config = parse("--config", str(path))
    assert config != RunConfig()
    assert config.output != RunConfig().output


@pytest.mark.parametrize("path", sorted((CONFIGS / "corpora").glob("*.yaml")), ids=lambda path: path.name)
def test_every_corpus_configuration_parses(path: Path) -> None:
    config = ArxivQAConfig if path.name.startswith("arxivqa-") else CorpusConfig
    assert parse_config(config, ["--config", str(path)], "test")[0].output


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_every_accelerate_configuration_is_one(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes >= 1


def test_the_options_of_tests_that_need_a_gpu_are_settings() -> None:
    from test_gpu import BFLOAT16

    assert parse(*BFLOAT16).base.dtype == "bfloat16"


def test_no_configuration_was_missed() -> None:
    assert len(RUNS) >= 5


# -- precedence and types ------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", training={"steps": 70, "learning_rate": 0.5}, seed=3)
    config = parse("--config", path, "--training.steps", "9", "--compressor.layout=after")
    assert (config.training.steps, config.training.learning_rate, config.seed) == (9, 0.5, 3)
    assert config.compressor.layout == "after"
    assert config.training.gradient_accumulation_steps == RunConfig().training.gradient_accumulation_steps


def test_nothing_given_is_the_default() -> None:
    assert parse() == RunConfig()


def test_rates_may_be_written_in_any_usual_way(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training:\n  learning_rate: 2e-4\n")
    assert parse("--config", str(tmp_path / "run.yaml")).training.learning_rate == 2e-4
    for text in ("1e-3", "0.001", "1.0e-3"):
        assert parse("--training.learning_rate", text).training.learning_rate == 1e-3


def test_lists_and_mixtures_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.yaml",
        data={"train": ["a.jsonl", "b.jsonl"], "lengths": [{"low": 4, "high": 8}, {"low": 9, "high": 20, "weight": 2}]},
        objective={"tokens": [{"tokens": 8, "weight": 2}, {"tokens": 1}]},
    )
    config = parse("--config", path)
    assert config.data.train == ["a.jsonl", "b.jsonl"]
    assert config.data.lengths == [LengthRange(4, 8), LengthRange(9, 20, 2)]
    assert config.objective.tokens == [TokensShare(8, 2), TokensShare(1)]
    config.objective.tokens.append(TokensShare(8, 0.5, longest=64))
    assert list(config.objective.weights().items()) == [(8, 2.5), (1, 1.0)]
    for argv in (["x.jsonl", "y.jsonl"], ['["x.jsonl","y.jsonl"]']):
        assert parse("--data.train", *argv).data.train == ["x.jsonl", "y.jsonl"]
    for argv in (["--data.train=x.jsonl"], ["--data.train", "x.jsonl"], ["--data.train=[x.jsonl]"]):
        assert parse(*argv, "--seed=3").data.train == ["x.jsonl"]


def test_lora_targets_are_all_or_a_list_of_names(tmp_path: Path) -> None:
    assert parse().compressor.lora_targets == "all-linear"
    assert parse("--compressor.lora_targets", "all-linear").compressor.lora_targets == "all-linear"
    assert parse("--compressor.lora_targets", "q_proj", "v_proj").compressor.lora_targets == ["q_proj", "v_proj"]
    path = write(tmp_path / "run.yaml", compressor={"lora_targets": ["k_proj"]})
    assert parse("--config", path).compressor.lora_targets == ["k_proj"]


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    config = parse("--training.steps", "5", "--objective.continuation", "0.5", "--compressor.memory_tokens", "32")
    assert parse("--config", write(tmp_path / "run.yaml", **asdict(config))) == config


# -- what is refused -----------------------------------------------------------------------------------------------

UNKNOWN = {
    "training.learning_rte": "training.learning_rate",
    "compressor.memory_token": "compressor.memory_tokens",
    "outptu": "output",
    "trainng.steps": "training.steps",
}


@pytest.mark.parametrize("key", list(UNKNOWN))
def test_an_unknown_option_names_the_nearest_known_one(key: str) -> None:
    for argv in ([f"--{key}", "1"], [f"--{key}=1"]):
        with pytest.raises(CompressorError, match=rf"command line: .* no setting {key}; did you mean {UNKNOWN[key]}\?"):
            parse(*argv)


@pytest.mark.parametrize(
    ("content", "key", "near"),
    [
        ({"sead": 1}, "sead", "seed"),
        ({"training": {"step": 3}}, "training.step", "training.steps"),
        ({"data": {"lengths": [{"low": 1, "hihg": 2}]}}, "data.lengths.hihg", "data.lengths.high"),
        ({"objective": {"tokens": [{"token": 1}]}}, "objective.tokens.token", "objective.tokens.tokens"),
    ],
)
def test_an_unknown_key_in_a_file_names_file_and_nearest(
    tmp_path: Path, content: dict[str, Any], key: str, near: str
) -> None:
    path = write(tmp_path / "run.yaml", **content)
    with pytest.raises(CompressorError, match=rf"run\.yaml: there is no setting {key}; did you mean {near}\?"):
        parse("--config", path)


def test_a_renamed_key_is_refused_by_its_new_name(tmp_path: Path) -> None:
    for old, new in RENAMED.items():
        part, key = old.split(".")
        path = write(tmp_path / "run.yaml", **{part: {key: 1}})
        for argv in ([f"--{old}=1"], ["--config", path]):
            with pytest.raises(CompressorError, match=rf": {old} is called {new} now"):
                parse(*argv)


OUT_OF_RANGE = {
    "seed": ("-1", "5000000000"),
    "training.steps": ("0", "-3"),
    "training.learning_rate": ("0", "-1", "7", ".nan", ".inf"),
    "training.warmup_steps": ("-1",),
    "training.decay_steps": ("-1", "100000"),
    "training.final_learning_rate": ("-0.1", "1.1"),
    "training.beta1": ("-0.1", "1"),
    "training.beta2": ("1.5",),
    "training.average_from": ("-1", "1000"),
    "training.weight_decay": ("-1",),
    "training.max_grad_norm": ("0", "-1", ".nan"),
    "training.batch_tokens": ("0",),
    "training.batch_passages": ("0",),
    "training.gradient_accumulation_steps": ("0",),
    "training.log_every": ("0",),
    "training.validate_every": ("0",),
    "training.checkpoint_every": ("0",),
    "training.keep_last": ("0",),
    "training.threads": ("0",),
    "compressor.memory_tokens": ("0", "513", "12"),
    "compressor.lora_rank": ("0",),
    "compressor.lora_alpha": ("0",),
    "compressor.lora_dropout": ("-0.1", "1"),
    "compressor.lora_targets": ("[]",),
    "compressor.max_passage_tokens": ("0",),
    "compressor.segment_tokens": ("0", "501"),
    "data.train": ("[]",),
    "data.validation": ("[]",),
    "data.lengths": ("[]",),
    "data.random_start": ("-0.1", "1.1"),
    "data.limit": ("0",),
    "data.validation_limit": ("0",),
    "data.workers": ("0",),
    "objective.tokens": ("[]",),
    "objective.regeneration": ("-1", "0"),
    "objective.continuation": ("-1",),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OUT_OF_RANGE.items() for value in values])
def test_a_value_out_of_range_names_key_value_and_range(key: str, value: str) -> None:
    with pytest.raises(CompressorError) as raised:
        parse(f"--{key}={value}")
    message = str(raised.value)
    assert "is out of range: it must be" in message
    assert key in message or (key == "objective.regeneration" and "objective = " in message)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--base.dtype", "float16", "--training.mixed_precision", "bf16"],
            "must be auto or no with base.dtype = float16",
        ),
        (["--training.steps", "many"], r"^training\.steps = 'many': it must be a whole number$"),
        (["--training.steps", "1.5"], r"^training\.steps = '1\.5': it must be a whole number$"),
        (["--compressor.layout", "sideways"], r"compressor\.layout.*sideways"),
        (["--stage", "dance"], r"^stage = 'dance': it must be one of regenerate, answer$"),
        (["--training.learning_rate"], r"training\.learning_rate"),
        (["something"], "something"),
        (["--config"], "--config needs a YAML file"),
        (["--config", "no/such.yaml"], r"no/such\.yaml does not exist"),
        (["--objective.tokens", '[{"tokens": 64}]'], r"objective\.tokens = 64.*compressor\.memory_tokens = 16"),
        (["--data.lengths", '[{"low": 4, "high": 600}]'], r"data\.lengths = 600.*max_passage_tokens = 500"),
        (
            ["--training.activation_checkpointing", "true", "--training.compile", "dynamic"],
            r"training\.activation_checkpointing.*training\.compile",
        ),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(argv: list[str], message: str) -> None:
    import re

    with pytest.raises(CompressorError) as raised:
        parse(*argv)
    assert re.search(message, str(raised.value), re.DOTALL)


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ("notes.txt -o m", {"text": "notes.txt", "output": "m"}),
        ("--checkpoint X notes.txt -o m", {"text": "notes.txt", "checkpoint": "X"}),
        ("-o m --checkpoint=X --tokens 4 notes.txt", {"text": "notes.txt", "tokens": 4}),
        ("-q -o m --keep-text notes.txt --overwrite", {"text": "notes.txt", "keep_text": True}),
        ("-o m --keep-text true notes.txt", {"text": "notes.txt", "keep_text": True}),
        ("-o m --keep-text false -", {"text": "-", "keep_text": False}),
        ("-o m --refine-steps 3 notes.txt", {"text": "notes.txt", "refine_steps": 3}),
        ("-o m a.txt --keep-text --tokens=4", {"text": "a.txt", "keep_text": True, "tokens": 4}),
        ("-o m --text notes.txt", {"text": "notes.txt", "output": "m"}),
        ("-o m a.txt b.txt", "'b.txt' is one too many: without its name only text is given"),
        ("-o m a.txt --text b.txt", "'a.txt' stands for --text, which is given too"),
        ("-o m a.txt --text=b.txt", "'a.txt' stands for --text, which is given too"),
        ("a.txt --tokens -o m", "tokens"),
        ("a.txt --tokens few -o m", "^tokens = 'few': it must be a whole number$"),
        ("a.txt -o m --bogus 3", "there is no setting bogus"),
        ("a.txt", "--output must be given: `test --help` has an example"),
        ("", "--output and --text must be given"),
    ],
)
def test_a_plain_argument_may_stand_anywhere(argv: str, wanted: dict[str, Any] | str) -> None:
    from compressor.commands.options import CompressOptions

    def parse() -> Any:
        return parse_config(CompressOptions, argv.split(), "test", {"overwrite": "replace"}, ["text"])[0]

    if isinstance(wanted, str):
        with pytest.raises(CompressorError, match=wanted):
            parse()
    else:
        found = parse()
        assert {name: getattr(found, name) for name in wanted} == wanted


@pytest.mark.parametrize("content", ["- a\n- b\n", "just text", "key: [unclosed", "\ttabs: no\n", "\xff\xfe"])
def test_a_file_that_is_no_settings_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CompressorError, match=r"broken\.yaml"):
        parse("--config", str(path))


@pytest.mark.parametrize(
    "settings",
    [{"layout": "sideways"}, {"passage_attention": "both"}, {"memory_tokens": 0}, {"memory_attention": "parts"}],
)
def test_settings_are_checked_outside_the_command_line_too(settings: dict[str, Any]) -> None:
    with pytest.raises(CompressorError, match="is out of range"):
        CompressorConfig(**settings)


def test_any_number_of_tokens_will_do_without_nesting() -> None:
    assert CompressorConfig(memory_tokens=12, layout="after").memory_tokens == 12


def test_names_have_dashes_or_underscores_and_booleans_are_switches() -> None:
    wanted = parse("--training.learning_rate=1e-3", "--training.resume", "true", "--data.train", '["a", "b"]')
    assert parse("--training.learning-rate", "1e-3", "--training.resume", "--data.train", "a", "b") == wanted
    assert wanted.training.resume
    for name in ("--dry-run", "--dry_run"):
        assert parse_config(RunConfig, [name, "--seed", "3"], "test", {"dry_run": "stop"})[1].dry_run


def test_every_leaf_can_be_named_on_the_command_line() -> None:
    keys = list(settings_of(RunConfig))
    assert "training.learning_rate" in keys
    assert len(keys) == len(set(keys)) > 50


# -- as a command --------------------------------------------------------------------------------------------------


def command(*argv: str, program: Sequence[str] = ("train.py",)) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", *program, *argv],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def mistyped() -> subprocess.CompletedProcess[str]:
    return command("--training.learning_rte", "1")


def test_a_mistake_ends_with_status_2_and_one_line(mistyped: subprocess.CompletedProcess[str]) -> None:
    lines = [line for line in mistyped.stderr.splitlines() if not line.startswith("import time:")]
    assert mistyped.returncode == 2
    assert lines == [
        "error: command line: there is no setting training.learning_rte; did you mean training.learning_rate?"
    ]


def test_a_mistake_is_told_before_anything_heavy_is_imported(mistyped: subprocess.CompletedProcess[str]) -> None:
    asked = command("--help", program=("-m", "compressor"))
    assert "regenerate" in asked.stdout
    for done in (mistyped, asked):
        lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
        imported = {line.split("|")[-1].strip() for line in lines}
        assert "yaml" in imported
        assert not imported & {"torch", "transformers", "accelerate", "datasets", "peft", "numpy"}


def test_print_config_shows_the_resolved_settings_as_yaml() -> None:
    done = command("--config", "configs/arxiv-mini/regenerate.yaml", "--print_config", "--training.steps", "77")
    assert done.returncode == 0
    shown = yaml.safe_load(done.stdout)
    assert shown["training"]["steps"] == 77
    assert shown["output"] == "outputs/arxiv-mini/regenerate"
    assert shown["compressor"]["memory_tokens"] == 16


def test_help_shows_options_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compress", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert shown.startswith("usage: compressor compress TEXT -o OUTPUT [options]\n")
    assert re.search(r"^  --keep-text$", shown, re.M)  # a switch
    assert "--refine-steps REFINE_STEPS" in shown


@pytest.mark.parametrize("text", ["#1 of what?", "&a", "123", "a: b", "", '"quoted"'])
def test_text_is_taken_as_it_is_typed(text: str) -> None:
    """Also what YAML takes for a comment or an anchor of nothing."""
    for argv in (["--question", text], [f"--question={text}"], ["a.txt", "--question", text]):
        assert parse_config(DemoConfig, argv, "", plain=("text",))[0].question == text
    assert parse_config(DemoConfig, ["--question", "null"], "")[0].question is None
