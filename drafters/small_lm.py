"""A small language model with the target's vocabulary as a drafter: any decoder-only transformers model.

It needs none of the target's features. Its slots lag behind and catch up when it is asked for a tree: it reads the
committed tokens themselves, prompt included. Source: speculative decoding with a small model (arXiv 2211.17192), here
with the dynamic tree of EAGLE-2 (arXiv 2406.16858); the authors of Dovetail run TinyLlama that way for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from drafters.checkpoint import refuse_pickles
from drafters.drafter import DrafterError, DraftState, Observation
from drafters.growing_tree import Children, GrowingTree, Level, best_children, grow
from drafters.proposal import Budget, Proposal
from kernels.tree_attention import Segment, causal_segment
from kernels.tree_attention.transformers_plugin import ATTENTION_NAME, RowPass, UnsupportedArchitecture, create_slots

MAX_PASS_ROWS = 256  # a long prompt is caught up with in pieces: the scores of a pass are rows x keys for every head
TOKENIZER_FILE = "tokenizer.json"


class SmallLMDrafter:
    """``model`` must have been created with ``ATTENTION_NAME``; ``vocab_size`` is the target's.

    ``capacity`` bounds committed and drafted rows of a slot together; a model with fewer positions than that proposes
    nothing beyond them. Scores are log-probabilities at temperature 1.
    """

    name = "small-lm"
    feature_layers: tuple[str, ...] = ()

    def __init__(self, model: Any, vocab_size: int, num_slots: int, capacity: int) -> None:
        config = model.config.get_text_config()
        self.model = model.eval().requires_grad_(False)
        self.vocab_size = vocab_size
        self.device: torch.device = next(model.parameters()).device
        capacity = min(capacity, config.max_position_embeddings)
        self.slots = create_slots(model, num_slots, capacity, self.device)

    @torch.inference_mode()
    def propose(self, states: Sequence[DraftState], budget: Budget) -> list[Proposal]:
        """One tree for each state; empty where the text has outgrown the model's positions."""
        wanted = [s for s in states if budget.rows > 1 and len(s.token_ids) < self.slots.capacity]
        if not wanted:
            return [Proposal()] * len(states)
        logits = self.catch_up(wanted)
        trees = {s.slot: GrowingTree(s.slot, len(s.token_ids), budget, i) for i, s in enumerate(wanted)}
        grow(self, list(trees.values()), logits, budget)
        return [trees[s.slot].growth.proposal() if s.slot in trees else Proposal() for s in states]

    def catch_up(self, states: Sequence[DraftState]) -> Tensor:
        """Commit every token of the requests that is new; logits [requests, V] after their roots."""
        segments: list[Segment] = []
        token_ids: list[int] = []
        last_rows: list[int] = []
        for state in states:
            known = state.token_ids
            # At least the root is run (again), since its logits are not kept.
            start = min(self.slots.lengths[state.slot], len(known) - 1)
            while len(known) - start > MAX_PASS_ROWS:
                piece = causal_segment(state.slot, start, MAX_PASS_ROWS)
                start += MAX_PASS_ROWS
                self.forward([piece], list(known[piece.prefix : start]), [MAX_PASS_ROWS - 1])
            segments.append(causal_segment(state.slot, start, len(known) - start))
            token_ids += known[start:]
            last_rows.append(len(token_ids) - 1)
        logits = self.forward(segments, token_ids, last_rows)
        for segment in segments:
            self.slots.lengths[segment.slot] = segment.num_keys
        return logits

    def forward(self, segments: Sequence[Segment], token_ids: list[int], wanted: list[int]) -> Tensor:
        """Logits [wanted, V] of consecutive rows, stored behind what their slots hold."""
        positions = [position for s in segments for position in range(s.prefix, s.num_keys)]
        rows = torch.tensor([token_ids, positions], device=self.device)
        return self.run(segments, rows[0], rows[1], torch.tensor(wanted, device=self.device))

    def run(self, segments: Sequence[Segment], token_ids: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        """One pass; token ids and positions [n] -> logits [wanted, V]."""
        for segment in segments:
            self.slots.check(segment)
        row_pass = RowPass(self.slots, segments)
        output = self.model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=wanted,
            row_pass=row_pass,
        )
        row_pass.check(type(self.model).__name__)
        # Padded vocabularies differ in their padding only; ids the target lacks must not be drafted.
        logits: Tensor = output.logits[0, :, : self.vocab_size]
        return logits

    def expand(self, outputs: Tensor, level: Level) -> Tensor:
        """A language model needs nothing from a node's parent but its keys."""
        del outputs
        positions = level.positions
        return self.run(level.segments, level.token_ids, positions, torch.arange(len(positions), device=self.device))

    def children(self, outputs: Tensor, top_k: int) -> list[Children]:
        """The best tokens for each row of logits."""
        return best_children(outputs, top_k)

    def observe(self, batch: Sequence[Observation]) -> None:
        """Nothing to take in: the committed tokens come with ``propose``."""

    def release(self, slot: int) -> None:
        """Empty the slot."""
        self.slots.release(slot)


def load_small_lm(
    folder: Path,
    target_folder: Path,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype,
    num_slots: int,
    capacity: int,
) -> SmallLMDrafter:
    """A folder as transformers saves it, as a drafter for the target in ``target_folder``.

    Errors: DrafterError for another vocabulary, a pickle, missing or unfitting weights, an unsupported architecture.
    """
    from transformers import AutoModelForCausalLM

    check_vocabulary(folder, target_folder)
    if not any(folder.glob("*.safetensors")):
        raise DrafterError(f"{folder} holds no *.safetensors{refuse_pickles(folder)}")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DrafterError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            names = ", ".join(sorted(map(str, report[problem]))[:5])
            raise DrafterError(f"the weights in {folder} do not fit its config.json: {problem} {names}")
    try:
        drafter = SmallLMDrafter(model.to(device), vocab_size, num_slots, capacity)
        probe = drafter.propose([DraftState(0, [0, 1])], Budget(rows=2, top_k=1, depth=0))
    except (UnsupportedArchitecture, AttributeError, TypeError) as error:
        raise DrafterError(f"{folder} cannot be a drafter: {error}") from error
    drafter.release(0)
    if len(probe[0]) != 1:
        raise DrafterError(f"{folder} cannot be a drafter: its forward pass gave no logits for the row asked for")
    return drafter


def check_vocabulary(folder: Path, target_folder: Path) -> None:
    """Refuse a model whose token ids mean other text than the target's; the message shows the first that differs."""
    own, wanted = read_vocabulary(folder), read_vocabulary(target_folder)
    if own == wanted:
        return
    by_id, wanted_by_id = ({i: token for token, i in tokens.items()} for tokens in (own, wanted))
    first = next(i for i in sorted(by_id.keys() | wanted_by_id.keys()) if by_id.get(i) != wanted_by_id.get(i))
    raise DrafterError(
        f"{folder.name} has another vocabulary than {target_folder.name}: token {first} is {by_id.get(first)!r} there "
        f"and {wanted_by_id.get(first)!r} in the target ({len(own)} and {len(wanted)} tokens); a drafting language "
        "model must share the target's tokenizer"
    )


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Tokens and their ids, added ones included."""
    from tokenizers import Tokenizer

    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise DrafterError(f"{file} does not exist; the vocabularies of target and drafter cannot be compared")
    try:
        return dict(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True))
    except Exception as error:  # the tokenizers package raises bare Exception
        raise DrafterError(f"{file} cannot be read as a tokenizer: {error}") from error
