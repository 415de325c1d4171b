"""A target as the source of features that a drafter learns from: any target, exactly as it will be served."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafters.train.capture import capture, describe, missing_shards
from drafters.train.corpus import CorpusError
from drafters.train.feature_source import (
    DataOptions,
    FeatureSource,
    OnTheFlySource,
    Samples,
    data_samples,
    packed_windows,
)
from drafters.train.records import READERS, TOOL, Message, read_conversations
from kernels.training import RecipeError, TrainingReport
from kernels.training.heartbeat import Heartbeat
from kernels.training.processes import is_first_process, wait_until
from server.answers import AnswersFile, Writing, questions_of, write_answers
from server.engine.engine import Engine, EngineOptions
from server.launch import load_codec, resolve_target
from server.targets.loading import load_target
from server.targets.target import PrefillChunk, Target
from server.text import TextCodec

logger = logging.getLogger(__name__)

SLOT = 0
MAX_NAMED = 5  # bad conversations that the log names one by one
ANSWERS_AT_ONCE = 4


def fingerprint(target: Target) -> str:
    """Identifies a target by its name and the bytes of its embedding, so features and drafters can be told apart."""
    weights = target.embedding().detach().cpu().contiguous().view(torch.uint8).flatten()
    return f"{target.info.name}:{hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]}"


def features_of(target: Target, token_ids: Tensor) -> Tensor:
    """[B, T, W] the selected features of whole sequences [B, T], each run alone from its first position."""
    rows = []
    for sequence in token_ids.tolist():
        rows.append(target.prefill(PrefillChunk(SLOT, sequence)).features)
        target.release(SLOT)
    # The engine's passes run in inference mode, whose tensors autograd refuses; a copy is an ordinary tensor.
    return torch.stack(rows).clone().to(token_ids.device)


def source_for(options: DataOptions, layers: Sequence[str] = ("last",)) -> FeatureSource:
    """Load the target a recipe's ``[data]`` table names; ``layers`` are the features it gives, side by side.

    When the samples are first asked for, the target writes its answers and captures its features, where the table says
    so. Errors: TargetError for layers it does not have, LaunchError for a target that cannot be found, RecipeError for
    windows longer than its context.
    """
    folder = resolve_target(options.target)
    num_slots = 1 if options.answers is None else ANSWERS_AT_ONCE
    check_data(options)
    with Heartbeat(f"loading {folder.name}"):
        # A request's last token is verified in a row of its own.
        target = load_target(folder, options.weights, num_slots, options.window_length + 1, threads=None)
    if options.window_length > target.info.context_length:
        raise RecipeError(
            f"data.window_length is {options.window_length}; the positions of {target.info.name} end at "
            f"{target.info.context_length}"
        )
    target.select_features(layers)

    def load() -> tuple[Samples, Samples | None]:
        return samples_of(target, folder, options, layers)

    embedding, lm_head = target.embedding(), target.lm_head()
    return OnTheFlySource(
        lambda token_ids: features_of(target, token_ids),
        embedding,
        embedding if lm_head is embedding else lm_head,
        fingerprint(target),
        load,
    )


def check_data(options: DataOptions) -> None:
    """Refuse data that give nothing, before a target is loaded for them. Errors: CorpusError, RecipeError."""
    if options.conversations is None:
        packed_windows(options, sys.maxsize)
        return
    file = Path(options.conversations).expanduser()
    if options.answers is not None:
        asked_questions(file, options.format)
    elif options.format in READERS:
        found = [talk for _, talk in read_conversations(file, options.format)]
        faults = [talk for talk in found if isinstance(talk, CorpusError)]
        if len(faults) == len(found):
            raise CorpusError(f"{file} gives nothing to train on: {faults[0] if faults else 'it is empty'}")
    elif not file.is_file():
        raise CorpusError(f"{file} does not exist; data.conversations of the recipe names it")


def samples_of(
    target: Target, folder: Path, options: DataOptions, layers: Sequence[str]
) -> tuple[Samples, Samples | None]:
    """(training samples, held-out samples or None), with answers and features prepared as the table asks."""
    if options.answers is not None:
        options = with_answers(target, folder, options)
    train_data, held_out_data = data_samples(options, chat_codec(options, folder), target.info.vocab_size)
    if options.captured is not None:
        folders = Path(options.captured).expanduser()
        train_data = captured(target, train_data, layers, folders / "train")
        if held_out_data is not None:
            held_out_data = captured(target, held_out_data, layers, folders / "held_out")
    return train_data, held_out_data


def chat_codec(options: DataOptions, path: Path) -> TextCodec | None:
    """The target's codec, where the data are not token ids already. Errors: TextError, TargetError."""
    return None if options.conversations is None else load_codec(path)


def with_answers(target: Target, folder: Path, options: DataOptions) -> DataOptions:
    """The table with the target's own answers in place of its conversations; what is missing is written now."""
    answers = answers_file(fingerprint(target), options)
    if is_first_process():
        if not answers.is_complete():
            engine_options = EngineOptions(ANSWERS_AT_ONCE, options.window_length)
            write_answers(Engine(target, None, engine_options), load_codec(folder), answers)
    else:
        wait_until(answers.is_complete)
    return dataclasses.replace(options, conversations=str(answers.file), format="messages", answers=None)


def answers_file(target_fingerprint: str, options: DataOptions) -> AnswersFile:
    """The file ``data.answers`` names, for the questions of ``data.conversations``. Errors: CorpusError."""
    assert options.conversations is not None
    assert options.answers is not None
    file = Path(options.conversations).expanduser()
    questions = asked_questions(file, options.format)
    writing = Writing(
        target=target_fingerprint,
        max_tokens=options.answer_tokens,
        length=options.window_length,
        temperature=options.answer_temperature,
        seed=options.seed,
    )
    return AnswersFile(Path(options.answers).expanduser(), writing, questions)


def asked_questions(file: Path, file_format: str) -> list[list[list[Message]]]:
    """The questions of every usable conversation; the others are named and counted. Errors: CorpusError for none.

    What follows a tool call answers the call, and the target would make another one, so those are not used.
    """
    questions: list[list[list[Message]]] = []
    passed_over: list[str] = []
    for place, talk in read_conversations(file, file_format):
        if isinstance(talk, CorpusError):
            passed_over.append(str(talk))
        elif talk.tools or any(message["role"] == TOOL for message in talk.messages):
            passed_over.append(f"{file}, {place}: it has tools, which the target's own answers are not written for")
        else:
            questions.append(questions_of(talk.messages))
    for reason in passed_over[:MAX_NAMED]:
        logger.warning("passed over: %s", reason)
    if passed_over:
        logger.warning("%s: %d conversations passed over, %d to answer", file, len(passed_over), len(questions))
    if not any(questions):
        raise CorpusError(f"{file} has no questions to answer: {passed_over[0] if passed_over else 'it is empty'}")
    return questions


def captured(target: Target, samples: Samples, layers: Sequence[str], folder: Path) -> Samples:
    """The samples with their features on disk; what is missing there is computed now, by the first process."""
    manifest = describe(samples, fingerprint(target), target.info.hidden_size, layers)
    if not is_first_process():
        wait_until(lambda: not missing_shards(folder, manifest))
    return capture(samples, lambda token_ids: features_of(target, token_ids), folder, manifest)


class DrafterTraining:
    """``dovetail train drafter``, and the cells of ``dovetail study drafter``.

    Recipes one after another with the same [data] and layers draw on one source: the cells of a study load their target
    and read its samples once.
    """

    def __init__(self) -> None:
        self.data: tuple[DataOptions, tuple[str, ...]] | None = None
        self.source: FeatureSource | None = None

    def __call__(self, recipe: dict[str, Any], *, resume: bool) -> TrainingReport:
        """Run a recipe; the report's checkpoint is a drafter folder ready to serve. Errors: those of ``source_for`` and
        of ``drafters.train.drafter_task.train_drafter``."""
        from drafters.train.drafter_task import train_drafter

        return train_drafter(recipe, self.source_of, resume=resume)

    def source_of(self, options: DataOptions, layers: Sequence[str]) -> FeatureSource:
        """``source_for``, or the source of the recipe before where it is the same."""
        data = (options, tuple(layers))
        if self.source is None or self.data != data:
            self.data, self.source = None, None  # two targets need not fit beside each other
            self.source = source_for(options, layers)
            self.data = data
        return self.source
