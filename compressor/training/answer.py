"""Stage `answer`: trains a compressor so that the frozen base answers questions from its memories."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from compressor.data.asked import QUESTIONS_TOGETHER, Asked, Draw, QuestionPlan, ask, questions_digest
from compressor.data.batches import IGNORED, answer_pair, by_length, pad, padded_width, stack_pairs
from compressor.data.instructions import Prompt, load_prompt
from compressor.data.questions import load_questions
from compressor.errors import CompressorError
from compressor.model.decoder import Prefix, empty_prefix, label_nats, token_prefix
from compressor.model.generation import after, generate
from compressor.processes import summed
from compressor.progress import note
from compressor.training.checkpoints import VALIDATION
from compressor.training.config import RunConfig
from compressor.training.regenerate import CompressionStage
from compressor.training.sharding import share_out
from compressor.training.stage import Batch

VALIDATED_TOGETHER, SAMPLES = 8, 3
ROOM = 256
"""Positions kept for prompt and answer after the longest passage that is asked about."""


def beside(drawn: Sequence[Draw], asked: Sequence[Asked]) -> list[Draw]:
    """Half of a micro-batch, each passage followed by its neighbour in the data, of the same article, say."""
    found = []
    for draw in drawn[: -(-len(drawn) // 2)]:
        near = draw.passage + (1 if draw.passage + 1 < len(asked) else -1)
        questions = tuple(range(len(asked[near].prompts)))[:QUESTIONS_TOGETHER]
        found += [draw, Draw(near, questions, asked[near].length)]
    return found


def together(rng: np.random.Generator, count: int, most: int, fewest: int = 1) -> list[list[int]]:
    """For each of `count` passages those that lie in its context, itself at a random place among others.

    Half of the contexts of several passages have its neighbour of `beside`.
    """
    contexts = []
    for own in range(count):
        size = int(rng.integers(min(fewest, count), min(most, count) + 1))
        others = [one for one in rng.permutation(count).tolist() if one != own]
        if rng.random() < 0.5:
            others.sort(key=lambda one: one != own ^ 1)
        contexts.append(others[: size - 1])
        contexts[-1].insert(int(rng.integers(size)), own)
    return contexts


def _too_few(sources: Sequence[str], found: Sequence[Asked]) -> str:
    count = len({one.context for one in found})
    return f"{', '.join(sources)} has {count} context{'s' * (count > 1)}, too few to hold some out: name more"


class AnswerStage(CompressionStage):
    """Micro-batches of questions among those of passages, whose objectives keep the skill of regeneration."""

    def __init__(self, config: RunConfig, accelerator: Accelerator):
        super().__init__(config, accelerator)
        data, model = config.data, self.module

        left_out = self.left_out["questions"]
        with accelerator.main_process_first():
            most = min(data.question_tokens or model.config.max_passage_tokens, model.config.max_passage_tokens)
            # Tokens that are read at a time: bounds read passages whole.
            self.most = most if model.encoder.makes_memories else 1 << 30
            if data.passages_together > 1 and not model.encoder.makes_memories:
                raise CompressorError(
                    f"method {model.config.method} makes no memories: set data.passages_together to 1"
                )
            longest = None if model.base.positions is None else model.base.positions // data.passages_together - ROOM
            sets: list[tuple[list[str], Prompt | None, float]] = [
                (one.data, load_prompt(one.prompt) if one.prompt else None, one.share) for one in data.instructions
            ]
            if data.questions:
                sets = [(data.questions, None, 1 - sum(share for _, _, share in sets)), *sets]
            asked, held_out, shares = [], [], []
            for sources, prompt, share in sets:
                questions = load_questions(
                    sources,
                    split="train",
                    limit=data.limit,
                    columns=(data.question_columns or None) if prompt is None else None,
                    keep_unanswerable=data.keep_unanswerable,
                    skip_bad_records=config.skip_bad_records,
                    left_out=left_out,
                    prompt=prompt,
                )
                template = (prompt and prompt.template) or model.config.question_template
                found = ask(questions, model.base.tokenizer, template, most, left_out, longest)
                # Questions of one context stay on one side, whatever segments they went to.
                count = min(-(-data.validation_limit // len(sets)), len(found) // 4)
                last = {one.context for one in found[len(found) - count :]}
                held_out += [one for one in found if one.context in last]
                kept = [one for one in found if one.context not in last]
                if not kept:
                    raise CompressorError(_too_few(sources, found))
                asked += kept
                shares.append((len(kept), share))
        if accelerator.is_main_process and left_out.total:
            note(f"note: {left_out.line('questions', sum(len(one.prompts) for one in [*asked, *held_out]))}")
        if not held_out:
            raise CompressorError(_too_few(["data.questions"], asked))
        self.asked, self.held_out_questions = asked, held_out
        settings = config.training
        self.questions = QuestionPlan(asked, settings.batch_tokens, settings.batch_passages, config.seed, shares)
        self._bounds: dict[str, float] = {}

    def micro_batch(self, index: int) -> Batch:
        rng = np.random.default_rng([self.config.seed, index, 2])
        if rng.random() >= self.config.data.question_share:
            return super().micro_batch(index)
        drawn, most, contexts = self.questions.batch(index), self.config.data.passages_together, None
        if most > 1:
            drawn = beside(drawn, self.asked)
            contexts = together(rng, len(drawn), most)
        segments = [self.asked[draw.passage].segments(self.most) for draw in drawn]
        tokens = self.draw_tokens(rng, [max(map(len, one)) for one in segments])
        return self.collate_questions(self.asked, drawn, tokens, contexts, rng)

    def collate_questions(
        self,
        asked: Sequence[Asked],
        drawn: Sequence[Draw],
        tokens: Sequence[int],
        contexts: Sequence[Sequence[int]] | None = None,
        rng: np.random.Generator | None = None,
    ) -> Batch:
        """Tensors for passages with their questions, each compressed to its number of memory tokens.

        Args:
            contexts: for each of `drawn` those whose memories its questions are asked of, in reading order; by default
                its own alone.
            rng: as in `collate`.
        """
        base, objective = self.module.base, self.config.objective
        chosen = [asked[draw.passage] for draw in drawn]
        segments = [one.segments(self.most) for one in chosen]
        flat = [self.padded(segment) for one in segments for segment in one]
        ids, lengths = pad(flat, width=padded_width)
        tokens = [count for count, one in zip(tokens, segments, strict=True) for _ in one]
        rows = [(owner, q) for owner, draw in enumerate(drawn) for q in draw.questions]
        prompts = [chosen[owner].prompts[q] for owner, q in rows]
        answers = [chosen[owner].answers[q] for owner, q in rows]
        pairs = [answer_pair(prompt, answer, base.eos) for prompt, answer in zip(prompts, answers, strict=True)]
        stacked = stack_pairs(pairs)
        batch: Batch = {
            "input_ids": ids,
            "lengths": lengths,
            "memory_tokens": torch.tensor(tokens),
            "ids": [one.id for one in chosen],
            "targets": stacked["targets"],
            "passages": len(chosen),
            "answer_passages": [one.ids for one in chosen],
            "answer_inputs": stacked["inputs"],
            "answer_labels": stacked["labels"],
            "answer_owners": torch.tensor([owner for owner, _ in rows]),
            "answer_prompts": prompts,
            "answer_weight": objective.answer,
            "distillation_weight": objective.distillation,
            "question_distillation_weight": objective.question_distillation,
        }
        if contexts is not None or len(flat) > len(chosen):
            places = iter(range(len(flat)))
            held = [[next(places) for _ in one] for one in segments]
            batch["answer_segments"] = [
                [row for one in context for row in held[one]] for context in contexts or [[i] for i in range(len(held))]
            ]
        if objective.unrelated_share and rng is not None and contexts is None:
            others = [(owner + 1) % len(chosen) for owner, _ in rows]
            apart = rng.random(len(rows)) < objective.unrelated_share
            apart &= [chosen[i].context != chosen[j].context for i, (j, _) in zip(others, rows, strict=True)]
            asked_of = [other if away else own for other, away, (own, _) in zip(others, apart, rows, strict=True)]
            batch |= {"answer_unrelated": torch.from_numpy(apart), "answer_owners": torch.tensor(asked_of)}
        if objective.asked_regeneration:
            # One encoding teaches both, and no step of an optimiser that scales gradients is the answers' alone.
            stacked = stack_pairs(self.regenerated(flat, rng))
            batch |= {"regeneration_inputs": stacked["inputs"], "regeneration_labels": stacked["labels"]}
            batch |= {"regeneration_weight": objective.asked_regeneration}
            batch["targets"] += stacked["targets"]
        return batch

    def origin(self) -> dict[str, str]:
        """See `Stage`."""
        return super().origin() | {
            "data.questions": questions_digest(self.asked),
            VALIDATION: f"{super().origin()[VALIDATION]}, {questions_digest(self.held_out_questions)}",
        }

    @torch.no_grad()
    def validate(self, accelerator: Accelerator) -> tuple[dict[str, float], list[str]]:
        """Nats a token of held-out answers for each number of memory tokens, from the full passage and from none.

        `answer_together` is of the most memory tokens, each passage's among those of `data.passages_together`.
        `loss` is the answers' where their weight is positive; regeneration is reported as `regeneration_nats_K`.
        """
        regeneration, samples = super().validate(accelerator)
        self.module.eval()
        weights = self.config.objective.weights()
        counts = list(weights)
        names = [f"answer_{count}" for count in counts]
        names += ["answer_together"] * (self.config.data.passages_together > 1)
        names += [] if self._bounds else ["answer_full", "answer_none"]
        sums = torch.zeros(len(names) + 1, dtype=torch.float64)
        groups = by_length([one.length for one in self.held_out_questions], VALIDATED_TOGETHER)
        for group in share_out(groups, self.module, accelerator):
            values, targets = self._validate_group(group, counts, accelerator)
            sums += torch.tensor([*values, targets], dtype=torch.float64)
        totals = summed(sums, accelerator)
        found = {name: value / max(1.0, totals[-1]) for name, value in zip(names, totals, strict=False)}
        # The base is frozen: what it does with the whole passage, or without, never changes.
        self._bounds = self._bounds or {name: found.pop(name) for name in ("answer_full", "answer_none")}
        loss = sum(weights[count] * found[f"answer_{count}"] for count in counts) / sum(weights.values())
        figures = {"loss": loss, **found, **self._bounds}
        figures |= {f"regeneration_{name}": value for name, value in regeneration.items()}
        if accelerator.is_main_process or self.module.sharded:
            samples = [*samples, *self.answer_samples(counts[0], accelerator)]
        self.module.train()
        return figures, samples

    def _validate_group(
        self, group: Sequence[int], counts: Sequence[int], accelerator: Accelerator
    ) -> tuple[list[float], int]:
        """Summed nats of answers for each count, together, then (the first time) full and none; and their tokens."""
        model, base, device = self.module, self.module.base, accelerator.device
        drawn = [Draw(i, tuple(range(len(self.held_out_questions[i].prompts)))[:4], 0) for i in group]
        batch = self.collate_questions(self.held_out_questions, drawn, [counts[0]] * len(drawn))
        ids, lengths, owners = (batch[name].to(device) for name in ("input_ids", "lengths", "answer_owners"))
        inputs, labels = batch["answer_inputs"].to(device), batch["answer_labels"].to(device)
        values = []
        with accelerator.autocast():
            for count in counts:
                keys, slots = model.encode(ids, lengths, count)
                prefix = self._contexts(batch, keys, slots, lengths).share(owners)
                values.append(float(label_nats(base, prefix, inputs, labels).sum()))
            if (most := self.config.data.passages_together) > 1:
                keys, slots = model.encode(ids, lengths, counts[0])
                contexts = together(np.random.default_rng(0), len(drawn), most, fewest=most)
                mixed = self.collate_questions(self.held_out_questions, drawn, [counts[0]] * len(drawn), contexts)
                prefix = self._contexts(mixed, keys, slots, lengths).share(owners)
                values.append(float(label_nats(base, prefix, inputs, labels).sum()))
            if not self._bounds:
                full = token_prefix(base, [self.held_out_questions[i].ids for i in group]).share(owners)
                values.append(float(label_nats(base, full, inputs, labels).sum()))
                nothing = empty_prefix(base, len(owners))
                answers = [self.held_out_questions[draw.passage].answers[q] for draw in drawn for q in draw.questions]
                pairs = [
                    answer_pair([base.bos, *prompt], answer, base.eos)
                    for prompt, answer in zip(batch["answer_prompts"], answers, strict=True)
                ]
                stacked = stack_pairs(pairs)
                shown = stacked["inputs"].to(device), stacked["labels"].to(device)
                values.append(float(label_nats(base, nothing, *shown).sum()))
        return values, int((labels != IGNORED).sum())

    def _contexts(self, batch: Batch, keys: Tensor, values: Tensor, lengths: Tensor) -> Prefix:
        """What the decoder reads of each passage of `collate_questions`, in however many segments it was encoded."""
        if (groups := batch.get("answer_segments")) is None:
            return self.module.prefix(keys, values, lengths)
        return self.module.joined_prefix(keys, values, lengths, torch.full_like(lengths, keys.shape[3]), groups)

    def answer_samples(self, tokens: int, accelerator: Accelerator) -> list[str]:
        """Some held-out questions with the right answer, the one from the memory and the one from the full passage."""
        model, base = self.module, self.module.base
        chosen = self.held_out_questions[:SAMPLES]
        prompts = [one.prompts[0] for one in chosen]
        drawn = [Draw(i, (0,), one.length) for i, one in enumerate(chosen)]
        batch = self.collate_questions(chosen, drawn, [tokens] * len(chosen))
        ids, lengths = (batch[name].to(accelerator.device) for name in ("input_ids", "lengths"))
        with accelerator.autocast():
            memory = self._contexts(batch, *model.encode(ids, lengths, tokens), lengths)
            full = token_prefix(base, [one.ids for one in chosen])
            written = [self._written(prefix, prompts) for prefix in (memory, full)]
        lines = []
        for one, prompt, from_memory, from_full in zip(chosen, prompts, *written, strict=True):
            question, right = (" ".join(base.tokenizer.decode(t).split()) for t in (prompt, one.answers[0]))
            lines.append(f"{question[:100]} | right: {right} | memory: {from_memory} | full passage: {from_full}")
        return lines

    def _written(self, prefix: Prefix, prompts: Sequence[Sequence[int]]) -> list[str]:
        base = self.module.base
        written = generate(base, prefix, after(base, prefix, prompts), [16] * len(prompts))
        return [" ".join(base.tokenizer.decode(one.ids, skip_special_tokens=True).split()) for one in written]
