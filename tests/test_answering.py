"""Stage `answer`: what its micro-batches hold, its losses, and that it trains, validates and resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.api import Compressor
from compressor.commands.cli import train_main
from compressor.data.asked import Draw
from compressor.data.batches import IGNORED, answer_pair
from compressor.errors import CompressorError
from compressor.model.decoder import decode, label_nats
from compressor.model.memory import Memory, memory_prefix
from compressor.parsing import parse_config
from compressor.processes import make_accelerator
from compressor.training.answer import AnswerStage
from compressor.training.config import RunConfig
from compressor.training.footprint import kept_of_answers
from compressor.training.loop import start_run
from compressor.training.objectives import answer_loss


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> str:
    """Three questions about each of twelve contexts, answered by words of the context."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    lines = []
    for number, text in enumerate(texts[:12]):
        context = text[:90]
        for place, word in enumerate(context.split()[:3]):
            record = {"id": f"q{number}-{place}", "context": context, "question": f"Which is word {place}?"}
            lines.append(json.dumps(record | {"answers": [word], "dataset": "words"}))
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def options(training_options: list[str], questions: str) -> list[str]:
    return [
        *training_options,
        "--stage=answer",
        f'--data.questions=["{questions}"]',
        "--data.question_share=0.6",
        "--compressor.max_passage_tokens=64",
        "--data.validation_limit=3",
    ]


@pytest.fixture
def make_stage(options: list[str], tmp_path: Path) -> Callable[..., AnswerStage]:
    def make(*argv: str) -> AnswerStage:
        config = parse_config(RunConfig, [*options, f"--output={tmp_path / 'run'}", *argv], "test")[0]
        return AnswerStage(config, start_run(config))

    return make


PARTS = ("regeneration_", "answer_")
NAMES = ("method", "model", "theory", "field", "surface", "energy", "data", "result")


def test_an_answer_is_what_follows_the_prompt() -> None:
    assert answer_pair([5, 6, 7], [8, 9], 2) == ([5, 6, 7, 8, 9], [IGNORED, IGNORED, 8, 9, 2])


def test_micro_batches_of_questions_come_among_those_of_passages(make_stage: Callable[..., AnswerStage]) -> None:
    stage = make_stage()
    base, asking = stage.module.base, 0
    for index in range(16):
        batch, again = stage.micro_batch(index), stage.micro_batch(index)
        assert all(
            torch.equal(batch[key], again[key]) if isinstance(batch[key], Tensor) else batch[key] == again[key]
            for key in batch
        )
        if "answer_inputs" not in batch:
            assert "regeneration_inputs" in batch
            continue
        asking += 1
        assert batch["targets"] == int((batch["answer_labels"] != IGNORED).sum())
        for row, owner in enumerate(batch["answer_owners"].tolist()):
            context = base.tokenizer.decode(batch["input_ids"][owner, : batch["lengths"][owner]])
            prompt = base.tokenizer.decode(batch["answer_prompts"][row])
            labels = [token for token in batch["answer_labels"][row].tolist() if token != IGNORED]
            assert labels[-1] == base.eos
            answer = base.tokenizer.decode(labels[:-1])
            place = int(prompt.split("word ")[1][0])
            assert prompt == f"\nQuestion: Which is word {place}? Answer:"
            assert answer == " " + context.split()[place]
    assert 4 < asking < 14


def test_passages_with_questions_are_regenerated_too(make_stage: Callable[..., AnswerStage]) -> None:
    """One encoding of each, as among the passages without questions; both losses add up."""
    stage = make_stage("--objective.asked_regeneration=0.5")
    model, batch = stage.module, _question_batch(stage)
    width = int(batch["lengths"].max()) + 1
    for row, length in enumerate(batch["lengths"].tolist()):
        passage = batch["input_ids"][row, :length].tolist()
        assert batch["regeneration_inputs"][row, : length + 1].tolist() == [model.base.bos, *passage]
        assert batch["regeneration_labels"][row, : length + 1].tolist() == [*passage, model.base.eos]
        assert batch["regeneration_labels"][row, length + 1 : width].tolist() == [IGNORED] * (width - length - 1)
    labels = (batch["answer_labels"], batch["regeneration_labels"])
    assert batch["targets"] == sum(int((one != IGNORED).sum()) for one in labels)
    with torch.no_grad():
        both = float(model(batch))
        more = float(model(batch | {"regeneration_weight": 1.0}))
        apart = [float(model({k: v for k, v in batch.items() if not k.startswith(name)})) for name in PARTS]
    assert both == pytest.approx(sum(apart), rel=1e-5)
    assert more == pytest.approx(apart[0] + 2 * apart[1], rel=1e-5)


def test_memories_of_several_passages_are_read_together(make_stage: Callable[..., AnswerStage]) -> None:
    """Each passage at every place of its contexts; losses and gradients are those of the concatenated memories."""
    stage = make_stage("--data.passages_together=3", "--compressor.layout=nested", "--data.question_share=1.0")
    model, places, order = stage.module.eval(), set(), [one.id for one in stage.asked]
    batches = [stage.micro_batch(index) for index in range(12)]
    for batch in batches:
        for own, rows in enumerate(batch["answer_segments"]):
            assert len(rows) == len(set(rows))
            places.add((len(rows), rows.index(own)))
        pairs = zip(batch["ids"][::2], batch["ids"][1::2], strict=True)
        assert all(abs(order.index(one) - order.index(other)) == 1 for one, other in pairs)
    assert places == {(count, place) for count in (1, 2, 3) for place in range(count)}
    batch = next(one for one in batches if len(one["ids"]) > 3)
    batch["memory_tokens"][:] = 4
    passages = [row[:length].tolist() for row, length in zip(batch["input_ids"], batch["lengths"], strict=True)]
    memories = model.compress_ids(passages, 4)
    joined = [Memory.concatenate([memories[row] for row in rows]) for rows in batch["answer_segments"]]
    with torch.no_grad():
        prefix = memory_prefix(model.base, joined).select(batch["answer_owners"])
        expected = label_nats(model.base, prefix, batch["answer_inputs"], batch["answer_labels"])
        assert float(model(batch)) == pytest.approx(float(expected.sum()), rel=1e-4)
    # The questions of the first passage alone teach the encoder with all that lies in their context.
    mine = batch["answer_owners"] == 0
    keys, values = model.encode(batch["input_ids"], batch["lengths"], 4)
    keys.retain_grad()
    rows = [2, 0, 1]
    prefix = model.joined_prefix(keys, values, batch["lengths"], batch["memory_tokens"], [rows] * len(passages))
    one = {name: batch[name][mine] for name in ("answer_owners", "answer_inputs", "answer_labels")}
    answer_loss(model, prefix, batch | one).backward()
    assert (keys.grad.abs().amax(dim=(0, 2, 3, 4)) > 0).nonzero().flatten().tolist() == sorted(rows)


def test_bounds_are_not_read_together(make_stage: Callable[..., AnswerStage]) -> None:
    with pytest.raises(CompressorError, match=r"makes no memories: set data\.passages_together to 1"):
        make_stage("--data.passages_together=2", "--compressor.method=full-tuned")


def test_a_share_of_the_passages_is_written_from_a_cue_on(make_stage: Callable[..., AnswerStage]) -> None:
    """In both kinds of micro-batches, drawn by their place in the run."""
    stage = make_stage("--objective.asked_regeneration=1", "--objective.cued_share=0.5")
    begun = {True: [0, 0], False: [0, 0]}
    for index in range(16):
        batch = stage.micro_batch(index)
        inputs, again = batch["regeneration_inputs"], stage.micro_batch(index)["regeneration_inputs"]
        assert torch.equal(inputs, again)
        for row in inputs.tolist():
            begun["answer_inputs" in batch][row[0] == stage.module.base.bos] += 1
    assert all(min(counts) > 5 for counts in begun.values())
    assert stage.probe_batch()["regeneration_inputs"][0, 0] == stage.module.base.bos


def test_held_out_contexts_are_not_trained_on(make_stage: Callable[..., AnswerStage]) -> None:
    stage = make_stage()
    trained, held_out = ({tuple(one.ids) for one in part} for part in (stage.asked, stage.held_out_questions))
    assert (len(trained), len(held_out)) == (9, 3)
    assert not trained & held_out


def test_segments_of_a_held_out_context_are_not_trained_on(make_stage: Callable[..., AnswerStage]) -> None:
    """Contexts of several segments lie on one side, too."""
    stage = make_stage("--data.question_tokens=8")
    trained, held_out = ({one.context for one in part} for part in (stage.asked, stage.held_out_questions))
    assert len(stage.asked) + len(stage.held_out_questions) > len(trained | held_out) == 12
    assert held_out
    assert not trained & held_out


def test_the_teacher_does_not_read_a_methods_padding(make_stage: Callable[..., AnswerStage]) -> None:
    """`reference-500x` extends passages with EOS; the base that it learns from reads them as they are."""
    method = ("--compressor.method=reference-500x", "--compressor.layout=published", "--compressor.memory_tokens=4")
    stage = make_stage(*method, '--objective.tokens=[{"tokens": 4}]', "--objective.distillation=1")
    batch = _question_batch(stage)
    assert batch["lengths"].tolist() == [500] * len(batch["answer_passages"])
    assert all(0 < len(ids) <= 64 for ids in batch["answer_passages"])
    model = stage.module
    with torch.no_grad():
        prefix = model.prefix(*model.encode(batch["input_ids"], batch["lengths"], 4), batch["lengths"])
        found = float(answer_loss(model, prefix, batch))
        padded = float(answer_loss(model, prefix, batch | {"answer_passages": batch["input_ids"].tolist()}))
    assert found != pytest.approx(padded, rel=1e-6)


def _question_batch(stage: AnswerStage) -> dict[str, Any]:
    return next(batch for batch in map(stage.micro_batch, range(40)) if "answer_inputs" in batch)


def test_answer_and_distillation_losses_are_likelihood_and_divergence(make_stage: Callable[..., AnswerStage]) -> None:
    stage = make_stage("--objective.distillation=0.5", "--objective.answer=2")
    model, batch = stage.module, _question_batch(stage)
    base = model.base
    with torch.no_grad():
        keys, values = model.encode(batch["input_ids"], batch["lengths"], int(batch["memory_tokens"].max()))
        prefix = model.prefix(keys, values, batch["lengths"], batch["memory_tokens"])
        both = float(answer_loss(model, prefix, batch))
        likelihood = float(answer_loss(model, prefix, batch | {"distillation_weight": 0.0}))
        rows = [ids[:n].tolist() for ids, n in zip(batch["input_ids"], batch["lengths"].tolist(), strict=True)]
        wanted = nll = divergence = 0.0
        for row, owner in enumerate(batch["answer_owners"].tolist()):
            chosen = batch["answer_labels"][row] != IGNORED
            inputs = batch["answer_inputs"][row : row + 1]
            student = decode(base, prefix.select(torch.tensor([owner])), inputs)[0, chosen].log_softmax(-1)
            # The teacher reads the whole passage as it would stand in a prompt.
            plain = torch.tensor([[base.bos, *rows[owner], *inputs[0].tolist()]])
            logits = base.model(input_ids=plain).logits[0, 1 + len(rows[owner]) :]
            teacher = logits[chosen].log_softmax(-1)
            nll -= float(student.gather(1, batch["answer_labels"][row, chosen][:, None]).sum())
            divergence += float((teacher.exp() * (teacher - student)).sum())
            wanted += 1
    assert likelihood == pytest.approx(2 * nll, rel=1e-4)
    assert both - likelihood == pytest.approx(0.5 * divergence, rel=1e-3)
    assert divergence > 0


def test_a_tuned_bound_teaches_answers_and_questions(
    make_stage: Callable[..., AnswerStage], options: list[str], tmp_path: Path
) -> None:
    """The teacher reads its trained prefix and the passage, on the base that the compressor adapts."""
    tuned = ["--compressor.method=full-tuned", '--objective.tokens=[{"tokens": 4}]', "--training.steps=2"]
    assert train_main([*options, *tuned, f"--output={tmp_path / 'bound'}"]) == 0
    bound = tmp_path / "bound" / "final"
    weights = ["--objective.answer=0", "--objective.distillation=2", "--objective.question_distillation=0.25"]
    stage = make_stage(*weights, f"--objective.teacher={bound}")
    model, batch, teacher = stage.module, _question_batch(stage), Compressor.from_pretrained(bound)
    assert not any("cartridge" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        keys, values = model.encode(batch["input_ids"], batch["lengths"], int(batch["memory_tokens"].max()))
        prefix = model.prefix(keys, values, batch["lengths"], batch["memory_tokens"])
        wanted = 0.0
        for row, owner in enumerate(batch["answer_owners"].tolist()):
            ids = torch.tensor([batch["answer_passages"][owner]])
            count = torch.tensor([ids.shape[1]])
            read = teacher.prefix(*teacher.encode(ids, count, teacher.config.memory_tokens), count)
            inputs = batch["answer_inputs"][row : row + 1]
            student = decode(model.base, prefix.select(torch.tensor([owner])), inputs)[0].log_softmax(-1)
            taught = decode(teacher.base, read, inputs)[0].log_softmax(-1)
            divergence = (taught.exp() * (taught - student)).sum(-1)
            prompt = len(batch["answer_prompts"][row])
            wanted += 2 * float(divergence[batch["answer_labels"][row] != IGNORED].sum())
            wanted += 0.25 * float(divergence[: prompt - 1].sum())
        assert float(answer_loss(model, prefix, batch)) == pytest.approx(wanted, rel=1e-4)
    stage.module(batch).backward()
    assert model.teacher is not None
    assert all(parameter.grad is None for parameter in model.teacher.encoder.parameters())


def test_a_teacher_that_is_no_bound_is_refused(make_stage: Callable[..., AnswerStage], tmp_path: Path) -> None:
    stage = make_stage()
    stage.module.save_pretrained(tmp_path / "kv")
    with pytest.raises(CompressorError, match="a checkpoint of kv: a teacher reads the passage itself"):
        make_stage("--objective.distillation=1", f"--objective.teacher={tmp_path / 'kv'}")
    with pytest.raises(CompressorError, match=r"objective\.teacher.*left out, or objective\.distillation positive"):
        make_stage(f"--objective.teacher={tmp_path / 'kv'}")


def test_unrelated_questions_are_taught_by_the_base_without_a_memory(make_stage: Callable[..., AnswerStage]) -> None:
    stage = make_stage("--objective.unrelated_share=0.5", "--objective.answer=2")
    model, base = stage.module, stage.module.base
    batches = ((index, stage.micro_batch(index)) for index in range(60))
    asking = ((index, one, one["answer_unrelated"]) for index, one in batches if "answer_unrelated" in one)
    index, batch, apart = next(found for found in asking if 0 < int(found[2].sum()) < len(found[2]))
    plain = make_stage("--objective.answer=2").micro_batch(index)
    assert torch.equal(apart, batch["answer_owners"] != plain["answer_owners"])
    with torch.no_grad():
        keys, values = model.encode(batch["input_ids"], batch["lengths"], int(batch["memory_tokens"].max()))
        prefix = model.prefix(keys, values, batch["lengths"], batch["memory_tokens"])
        wanted = 0.0
        for row, owner in enumerate(batch["answer_owners"].tolist()):
            chosen, inputs = batch["answer_labels"][row] != IGNORED, batch["answer_inputs"][row : row + 1]
            student = decode(base, prefix.select(torch.tensor([owner])), inputs)[0, chosen].log_softmax(-1)
            if apart[row]:
                begun = torch.tensor([[base.bos, *inputs[0].tolist()]])
                teacher = base.model(input_ids=begun).logits[0, 1:][chosen].log_softmax(-1)
                wanted += float((teacher.exp() * (teacher - student)).sum())
            else:
                wanted -= 2 * float(student.gather(1, batch["answer_labels"][row, chosen][:, None]).sum())
        assert float(answer_loss(model, prefix, batch)) == pytest.approx(wanted, rel=1e-4)
        none = batch | {"answer_unrelated": torch.ones_like(apart), "distillation_weight": 1.0}
        assert float(answer_loss(model, prefix, none)) > 0


def test_gradient_reaches_every_parameter_and_not_the_base(make_stage: Callable[..., AnswerStage]) -> None:
    stage = make_stage("--objective.distillation=1")
    batch = _question_batch(stage)
    batch["memory_tokens"] = torch.full_like(batch["memory_tokens"], stage.module.config.memory_tokens)
    stage.module(batch).backward()
    for name, parameter in stage.module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_run_learns_validates_and_resumes_exactly(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(output: Path, steps: int, *more: str) -> list[dict[str, Any]]:
        argv = [*options, f"--output={output}", f"--training.steps={steps}", "--training.validate_every=6"]
        assert train_main([*argv, "--training.lr_scheduler_type=constant", *more]) == 0
        rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    whole = run(tmp_path / "whole", 6)
    assert "right:" in capsys.readouterr().out
    validated = next(row for row in whole if "validation_loss" in row)
    names = {"answer_4", "answer_2", "answer_full", "answer_none", "regeneration_nats_4"}
    assert {f"validation_{name}" for name in names} <= set(validated)
    run(tmp_path / "parts", 3)
    again = run(tmp_path / "parts", 6, "--training.resume=true")
    assert [row for row in again if "validation_loss" not in row] == [
        row for row in whole if "validation_loss" not in row
    ]
    assert again[-1] == whole[-1]
    assert Compressor.from_pretrained(tmp_path / "whole" / "final").answer([], []) == []


def test_what_questions_take_of_memory_is_measured(make_stage: Callable[..., AnswerStage]) -> None:
    stage = make_stage()
    assert kept_of_answers(stage, [stage.micro_batch(index) for index in range(3)]) > 0


def test_settings_that_cannot_train_are_refused(options: list[str]) -> None:
    for argv, message in (
        (["--data.questions=[]"], "data.questions"),
        (["--objective.answer=0"], "objective.answer"),
        (["--data.question_share=0"], "data.question_share"),
        (["--compressor.question_template=Answer this"], "question_template"),
    ):
        with pytest.raises(CompressorError, match=message):
            parse_config(RunConfig, [*options, *argv], "test")


def test_a_set_of_one_context_beside_others_is_refused_by_name(
    make_stage: Callable[..., AnswerStage], tmp_path: Path
) -> None:
    """All of it would be held out, and a micro-batch be drawn from nothing."""
    one = tmp_path / "one.jsonl"
    context = " ".join(f"the {name} is here and that is all of it" for name in NAMES)
    rows = [{"id": name, "context": context, "question": "Where?", "answers": [name]} for name in NAMES]
    one.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": f"{i} Short text here.", "targets": ["Short."]} for i in range(8)]
    (tmp_path / "tldr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    sets = [{"data": [str(tmp_path / "tldr.jsonl")], "prompt": "summarise", "share": 0.5}]
    argv = [f'--data.questions=["{one}"]', "--data.question_tokens=32", f"--data.instructions={json.dumps(sets)}"]
    with pytest.raises(CompressorError, match=r"one\.jsonl has 1 context, too few to hold some out"):
        make_stage(*argv)


def test_instructions_are_read_from_the_memories_of_all_segments(
    tmp_path: Path, tiny_base_folder: Path, corpus: tuple[str, str], training_options: list[str]
) -> None:
    """Their loss is that of the concatenated memory, and its gradient reaches every segment."""
    text = "Ada met Charles in London and they spoke of engines until the evening came. " * 4
    rows = [
        {"id": str(i), "passage": f"{i} {text}", "instruction": "List the people.", "answer": "Ada; Charles"}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summaries = [{"id": str(i), "text": f"{i} Short text here.", "targets": ["Short."]} for i in range(8)]
    (tmp_path / "tldr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in summaries))
    sets = [{"data": [str(tmp_path / "rows.jsonl")], "prompt": "entities", "share": 0.5}]
    sets += [{"data": [str(tmp_path / "tldr.jsonl")], "prompt": "summarise", "share": 0.5}]
    options = [*training_options, "--stage=answer", f"--data.instructions={json.dumps(sets)}"]
    options += ["--data.question_share=1.0", f"--output={tmp_path / 'run'}", "--training.steps=2"]
    options += ["--compressor.layout=nested", "--training.validate_every=2", "--training.warmup_steps=1"]
    assert train_main(options) == 0
    config, _ = parse_config(RunConfig, options, "")
    stage = AnswerStage(config, make_accelerator())
    assert {len(one.segments(32)) > 1 for one in stage.asked} == {True, False}
    place = next(i for i, one in enumerate(stage.asked) if len(one.segments(32)) > 1)
    one = stage.asked[place]
    batch = stage.collate_questions(stage.asked, [Draw(place, (0,), one.length)], [4])
    assert batch["answer_segments"] == [list(range(len(one.segments(32))))]
    model = stage.module.eval()
    (memory,) = model.compress_ids([one.ids], 4, segment_tokens=32)
    with torch.no_grad():
        prefix = memory_prefix(model.base, [memory])
        expected = label_nats(model.base, prefix, batch["answer_inputs"], batch["answer_labels"])
        assert float(model(batch)) == pytest.approx(float(expected.sum()), rel=1e-4)
    keys, values = model.encode(batch["input_ids"], batch["lengths"], 4)
    keys.retain_grad()
    prefix = model.joined_prefix(keys, values, batch["lengths"], batch["memory_tokens"], batch["answer_segments"])
    answer_loss(model, prefix, batch).backward()
    assert (keys.grad.abs().amax(dim=(0, 2, 3, 4)) > 0).all()
    assert len(keys.grad[0]) == len(memory.segments)
