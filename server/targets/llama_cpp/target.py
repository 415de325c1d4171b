"""A GGUF file verified by llama.cpp: one decode gives logits and post-norm features of all rows of all requests.

All requests live in one context. A tree's rows carry the sequence ids of the leaves below them (``sequences``), so a
row sees its ancestors and nobody else; ``keep`` is a few calls on the cells' ids and moves no data.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.targets.gguf.header import GGUFFile, open_gguf
from server.targets.gguf.weights import file_weights, read_any
from server.targets.llama_cpp.library import ContextOptions, LlamaCppError, OpenModel, Row, library, try_out
from server.targets.llama_cpp.sequences import SequenceIds, leaves_below
from server.targets.target import PrefillChunk, Prefilled, TargetError, TargetInfo, Verified, VerifyRows, share_out

LAST = "last"
CELLS_MULTIPLE = 256  # the library rounds its cells up to this


@dataclass
class LlamaCppOutputs:
    """What one decode gave: features [rows, hidden] and logits [rows, vocabulary], both fp32."""

    features: Tensor
    all_logits: Tensor

    @cached_property
    def greedy_ids(self) -> list[int]:
        """The arg-max of every row."""
        token_ids: list[int] = self.all_logits.argmax(dim=-1).tolist()
        return token_ids

    def argmax(self) -> list[int]:
        """The greedy next token after each row."""
        return self.greedy_ids

    def logits(self, row_ids: Sequence[int]) -> Tensor:
        """[len(row_ids), vocabulary] fp32."""
        return self.all_logits[list(row_ids)]


@dataclass
class Tree:
    """The rows of a slot's last pass that ``keep`` has not settled: the leaves below each, and each leaf's id."""

    below: list[list[int]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


class LlamaCppTarget:
    """See ``Target`` for the methods' meaning. Rows are equal to plain ones up to rounding, not to the last bit."""

    def __init__(self, file: GGUFFile, opened: OpenModel, num_slots: int) -> None:
        self.file, self.opened, self.api = file, opened, opened.api
        api, model = opened.api, opened.model
        self.lengths = [0] * num_slots
        self.trees = [Tree() for _ in range(num_slots)]
        self.ids = SequenceIds(num_slots, api.llama_n_seq_max(opened.context))
        self.info = TargetInfo(
            name=file.path.name.removesuffix(".gguf"),
            architecture=file.get("general.architecture", str, ""),
            vocab_size=api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)),
            hidden_size=api.llama_model_n_embd_out(model),
            num_layers=api.llama_model_n_layer(model),
            context_length=api.llama_model_n_ctx_train(model),
            num_parameters=api.llama_model_n_params(model),
            weights=file_weights(file),
            feature_layers=(LAST,),
        )

    @classmethod
    def load(
        cls, path: Path, num_slots: int, capacity: int, threads: int, kv_cache: str | None = None, gpu_layers: int = 0
    ) -> LlamaCppTarget:
        """The file is checked by our own reader, then opened in another process, then here.

        ``capacity`` counts rows a slot can hold. Errors: TargetError naming the file and the cause.
        """
        file = open_gguf(path)
        check_causal(file)
        try:
            limit = library().max_sequences
            if num_slots >= limit:
                raise LlamaCppError(f"{num_slots} requests at once are asked for, it can tell {limit - 1} apart")
            cells = -(-num_slots * capacity // CELLS_MULTIPLE) * CELLS_MULTIPLE
            options = ContextOptions(cells, limit, threads, kv_cache, gpu_layers)
            return cls(file, OpenModel(path, try_out(path, options)), num_slots)
        except LlamaCppError as error:
            raise TargetError(f"{path} cannot be run by llama.cpp: {error}") from error

    def select_features(self, layers: Sequence[str]) -> None:
        """``last`` is all there is."""
        if unknown := sorted(set(layers) - {LAST}):
            raise TargetError(f"llama.cpp gives no feature layers {', '.join(unknown)}; it gives {LAST}")

    def prefill(self, chunk: PrefillChunk) -> Prefilled:
        """Run and commit consecutive rows."""
        self._drop_tree(chunk.slot)
        length = self.lengths[chunk.slot]
        rows = [Row(token_id, length + i, (chunk.slot,)) for i, token_id in enumerate(chunk.token_ids)]
        self._decode(rows)
        self.lengths[chunk.slot] = length + len(rows)
        features, shape = self._features(len(rows)), (len(rows), self.info.vocab_size)
        return Prefilled(
            features,
            features,
            lambda wanted: as_tensor(self.api.llama_get_logits(self.opened.context), shape)[list(wanted)],
        )

    def verify(self, rows: Sequence[VerifyRows]) -> list[Verified]:
        """One decode over the rows of all requests; they stay behind the committed rows until ``keep``."""
        decoded: list[Row] = []
        for part in rows:
            self._drop_tree(part.slot)
        try:
            for part in rows:
                decoded += self._hang(part)
            self._decode(decoded)
        except Exception:
            for part in rows:
                self._drop_tree(part.slot)
            raise
        logits = as_tensor(self.api.llama_get_logits(self.opened.context), (len(decoded), self.info.vocab_size))
        return share_out(LlamaCppOutputs(self._features(len(decoded)), logits), rows)

    def _hang(self, part: VerifyRows) -> list[Row]:
        """Give a tree's leaves their sequences: the committed rows become theirs too."""
        slot, length = part.slot, self.lengths[part.slot]
        below = leaves_below(part.proposal.row_parents)
        try:
            lent = self.ids.lend(len(below[0]) - 1)
        except ValueError as error:
            raise TargetError(str(error)) from error
        tree = self.trees[slot] = Tree(below, [slot, *lent])
        for sequence_id in lent:
            self.api.llama_memory_seq_cp(self.opened.memory, slot, sequence_id, 0, length)
        depths = (0, *(depth for depth in part.proposal.depths))
        token_ids = (part.root_id, *part.proposal.token_ids)
        return [
            Row(token_id, length + depth, [tree.ids[leaf] for leaf in leaves])
            for token_id, depth, leaves in zip(token_ids, depths, below, strict=True)
        ]

    def keep(self, slot: int, rows: Sequence[int]) -> None:
        """Commit a path of the last pass: its cells become the slot's, and no other id keeps any."""
        tree, length = self.trees[slot], self.lengths[slot]
        if not rows or rows[-1] >= len(tree.below):
            raise TargetError(f"slot {slot} has no rows {list(rows)} to keep; its last pass had {len(tree.below)}")
        end, memory = length + len(rows), self.opened.memory
        branch = tree.ids[tree.below[rows[-1]][0]]
        if branch != slot:
            self.api.llama_memory_seq_rm(memory, slot, length, -1)
            self.api.llama_memory_seq_cp(memory, branch, slot, length, end)
        self.lengths[slot] = end
        self._drop_tree(slot)

    def _drop_tree(self, slot: int) -> None:
        """Forget what is not committed."""
        tree, memory = self.trees[slot], self.opened.memory
        if not tree.ids:
            return
        self.api.llama_memory_seq_rm(memory, slot, self.lengths[slot], -1)
        for sequence_id in tree.ids[1:]:
            self.api.llama_memory_seq_rm(memory, sequence_id, -1, -1)
        self.ids.take_back(tree.ids[1:])
        self.trees[slot] = Tree()

    def read_rows(self, slot: int, start: int, stop: int) -> tuple[Tensor, ...]:
        """The library's own state of these rows, as bytes."""
        (borrowed,) = self.ids.lend(1)
        context, memory = self.opened.context, self.opened.memory
        self.api.llama_memory_seq_cp(memory, slot, borrowed, start, stop)
        state = torch.empty(self.api.llama_state_seq_get_size(context, borrowed), dtype=torch.uint8)
        buffer = ctypes.cast(state.data_ptr(), ctypes.POINTER(ctypes.c_uint8))
        written = self.api.llama_state_seq_get_data(context, buffer, state.numel(), borrowed)
        self._empty(borrowed)
        if written != state.numel():
            raise TargetError(f"llama.cpp gave {written} of the {state.numel()} bytes of rows {start} to {stop}")
        return (state,)

    def write_rows(self, slot: int, rows: Sequence[Tensor]) -> None:
        """Commit rows read earlier, behind those there."""
        (state,) = rows
        (borrowed,) = self.ids.lend(1)
        memory, length = self.opened.memory, self.lengths[slot]
        buffer = ctypes.cast(state.data_ptr(), ctypes.POINTER(ctypes.c_uint8))
        read = self.api.llama_state_seq_set_data(self.opened.context, buffer, state.numel(), borrowed)
        first, last = (
            self.api.llama_memory_seq_pos_min(memory, borrowed), self.api.llama_memory_seq_pos_max(memory, borrowed),
        )  # fmt: skip
        if read == state.numel() and first == length:
            self.api.llama_memory_seq_cp(memory, borrowed, slot, first, last + 1)
            self.lengths[slot] = last + 1
        self._empty(borrowed)
        if self.lengths[slot] == length:
            raise TargetError(f"rows from position {first} cannot follow the {length} rows of slot {slot}")

    def _empty(self, sequence_id: int) -> None:
        """A borrowed id goes back without cells."""
        self.api.llama_memory_seq_rm(self.opened.memory, sequence_id, -1, -1)
        self.ids.take_back([sequence_id])

    def release(self, slot: int) -> None:
        """Empty a slot."""
        self._drop_tree(slot)
        self.api.llama_memory_seq_rm(self.opened.memory, slot, -1, -1)
        self.lengths[slot] = 0

    def check_integrity(self) -> None:
        """Raises TargetError where a cell or a sequence id has leaked; for moments when nothing runs."""
        memory, num_ids = self.opened.memory, self.api.llama_n_seq_max(self.opened.context)
        held = [i for i in range(num_ids) if self.api.llama_memory_seq_pos_max(memory, i) >= 0]
        if held or any(self.lengths) or len(self.ids.free) != num_ids - len(self.lengths):
            raise TargetError(f"sequences {held} still hold cells, {len(self.ids.free)} ids are free")

    @cached_property
    def _embedding(self) -> Tensor:
        return read_any(self.file, "token_embd.weight")

    def embedding(self) -> Tensor:
        """[vocabulary, hidden]."""
        return self._embedding

    @cached_property
    def _lm_head(self) -> Tensor:
        return read_any(self.file, "output.weight") if "output.weight" in self.file.tensors else self._embedding

    def lm_head(self) -> Tensor:
        """[vocabulary, hidden]."""
        return self._lm_head

    def _decode(self, rows: Sequence[Row]) -> None:
        """Run rows. Errors: TargetError; no row is left behind then."""
        status = self.opened.decode(rows)
        if status != 0:
            for sequence_id, position in {(i, row.position) for row in rows for i in row.sequence_ids}:
                self.api.llama_memory_seq_rm(self.opened.memory, sequence_id, position, -1)
            raise TargetError(f"llama.cpp did not run {len(rows)} rows ({status}): {self.opened.library.reason()}")

    def _features(self, num_rows: int) -> Tensor:
        """[rows, hidden] after the final norm."""
        return as_tensor(self.api.llama_get_embeddings(self.opened.context), (num_rows, self.info.hidden_size))


def as_tensor(numbers: Any, shape: tuple[int, int]) -> Tensor:
    """A copy of floats behind a C pointer: the next decode overwrites them."""
    return torch.from_numpy(np.ctypeslib.as_array(numbers, shape).copy())


def check_causal(file: GGUFFile) -> None:
    """Errors: TargetError for files that hold no language model."""
    name = file.get("general.architecture", str, "")
    if not file.tensors:
        raise TargetError(f"{file.path} holds a vocabulary only, no weights; give the whole model's file")
    if file.get(f"{name}.attention.causal", bool, True) is False:
        raise TargetError(f"{file.path} is an embedding model ({name}), which writes no text")
