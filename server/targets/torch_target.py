"""Any decoder-only transformers model as a target: weights on the CPU, our attention and KV slots plugged in.

The model's own code runs unchanged; ``kernels.tree_attention.transformers_plugin`` says how.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kernels.tree_attention import Segment, causal_segment, tree_segment
from kernels.tree_attention.transformers_plugin import ATTENTION_NAME, RowPass, UnsupportedArchitecture, create_slots
from server.placement.devices import CPU
from server.targets.checkpoint import MALFORMED, check_files, read_config, reason_of, tell_unused
from server.targets.feature_tap import FeatureTap
from server.targets.rope import by_position, check_frequencies
from server.targets.target import PrefillChunk, Prefilled, TargetError, TargetInfo, Verified, VerifyRows, share_out

logger = logging.getLogger(__name__)

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
KV_CACHES = {"bf16": torch.bfloat16, "int8": torch.int8}


class TorchOutputs:
    """Features of every row; arg-max and logits are computed when asked, in one product over all rows."""

    def __init__(self, features: Tensor, last: Tensor, head: LogitsHead) -> None:
        self.features = features
        self.last = last
        self.head = head

    @cached_property
    def all_logits(self) -> Tensor:
        """[rows, vocabulary] fp32."""
        return self.head(self.last)

    @cached_property
    def greedy_ids(self) -> list[int]:
        """The arg-max of every row."""
        return self.head.argmax(self.last)

    def argmax(self) -> list[int]:
        """The greedy next token after each row."""
        return self.greedy_ids

    def logits(self, row_ids: Sequence[int]) -> Tensor:
        """[len(row_ids), vocabulary] fp32."""
        return self.all_logits[list(row_ids)]


class LogitsHead:
    """The LM head and whatever the architecture does to its product (Gemma 2 caps, Cohere and Granite scale)."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.projection: nn.Module = model.get_output_embeddings()
        self.factor: float = getattr(config, "logit_scale", None) or 1.0
        self.factor /= getattr(config, "logits_scaling", None) or 1.0
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)

    def __call__(self, features: Tensor) -> Tensor:
        """features [rows, hidden] -> logits [rows, vocabulary] in fp32."""
        return self.finished(self.projection(features).float())

    def finished(self, logits: Tensor) -> Tensor:
        """A product of the head as logits."""
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def argmax(self, features: Tensor) -> list[int]:
        """The greedy token after each row."""
        token_ids: list[int] = self(features).argmax(dim=-1).tolist()
        return token_ids


def load_transformers_model(folder: Path, dtype: torch.dtype) -> Any:
    """A causal language model from a folder of safetensors, with our attention plugged in.

    Errors: TargetError naming the file, or the weights that do not fit the config.
    """
    check_files(folder)
    config = read_config(folder)
    try:
        with quiet_transformers():  # its report of many lines is told below in one
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except MALFORMED as error:
        raise TargetError(f"{folder} cannot be loaded as a causal language model: {reason_of(error)}") from error
    misfits = [f"they lack {name}" for name in sorted(report["missing_keys"])]
    misfits += [
        f"{name} is {list(stored)}, the configuration says {list(wanted)}"
        for name, stored, wanted in sorted(report["mismatched_keys"])
    ]
    if misfits:
        more = f" and {len(misfits) - 1} more do not fit" if len(misfits) > 1 else ""
        raise TargetError(f"the weights in {folder} do not fit its config.json: {misfits[0]}{more}")
    check_frequencies(model, folder)
    tell_unused(folder, sorted(report["unexpected_keys"]))
    return model


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers logs errors alone."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


class TorchTarget:
    """A target run by transformers on the CPU; see ``Target`` for the methods' meaning."""

    def __init__(
        self, model: Any, name: str, weights: str, num_slots: int, capacity: int, kv_cache: str | None = None
    ) -> None:
        """``model`` must have been created with ``ATTENTION_NAME``; ``capacity`` counts rows a slot can hold.

        It stays on its device, where the slots are made. ``kv_cache`` is one of ``KV_CACHES``; None holds keys and
        values in the model's own type.
        """
        config = model.config.get_text_config()
        for setting in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            if getattr(config, setting, None) is None:
                raise TargetError(
                    f"{type(model).__name__} cannot be a target: its config has no {setting}; decoder-only models with "
                    "attention in every layer and positions given by number can"
                )
        self.model = model.eval().requires_grad_(False)
        self.device: torch.device = model.get_input_embeddings().weight.device
        if (note := by_position(model.base_model)) is not None:
            logger.warning("%s: %s", name, note)
        self.head = LogitsHead(model)
        self.slots = create_slots(
            model, num_slots, capacity, self.device, None if kv_cache is None else KV_CACHES[kv_cache]
        )
        self.tap = FeatureTap(model.base_model, config.num_hidden_layers)
        self.info = TargetInfo(
            name=name,
            architecture=type(model).__name__,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            context_length=config.max_position_embeddings,
            num_parameters=sum(p.numel() for p in model.parameters()),
            weights=weights,
            feature_layers=self.tap.available,
        )

    @classmethod
    def load(
        cls, folder: Path, weights: str, num_slots: int, capacity: int, kv_cache: str | None = None
    ) -> TorchTarget:
        """Load a folder of safetensors. Errors: TargetError naming the file or setting that is wrong."""
        if weights not in WEIGHTS:
            raise TargetError(f"weights {weights!r} are not available; allowed are {', '.join(WEIGHTS)}")
        model = load_transformers_model(folder, WEIGHTS[weights])
        return cls.checked(model, folder.name, weights, num_slots, capacity, kv_cache)

    @classmethod
    def checked(
        cls, model: Any, name: str, weights: str, num_slots: int, capacity: int, kv_cache: str | None = None
    ) -> TorchTarget:
        """A model as a target, tried once. Errors: TargetError, in one sentence, for whatever its layers trip over."""
        try:
            target = cls(model, name, weights, num_slots, capacity, kv_cache)
            target.self_check()
        except TargetError:
            raise
        except (UnsupportedArchitecture, *MALFORMED) as error:
            raise TargetError(
                f"{name} cannot be a target: {type(model).__name__} failed in a first short pass: {reason_of(error)}"
            ) from error
        return target

    def prefill(self, chunk: PrefillChunk) -> Prefilled:
        """Run and commit consecutive rows."""
        length = self.slots.lengths[chunk.slot]
        segment = causal_segment(chunk.slot, length, len(chunk.token_ids))
        positions = list(range(length, length + len(chunk.token_ids)))
        last = self._forward([segment], list(chunk.token_ids), positions)
        self.slots.lengths[chunk.slot] = length + len(chunk.token_ids)
        return Prefilled(self.tap.features(last), last, lambda rows: self.head(last[list(rows)]))

    def verify(self, rows: Sequence[VerifyRows]) -> list[Verified]:
        """One pass over the rows of all requests; they stay behind the committed rows until ``keep``."""
        last = self._forward(*self._rows_of(rows))
        return share_out(TorchOutputs(self.tap.features(last), last, self.head), rows)

    def _rows_of(self, rows: Sequence[VerifyRows]) -> tuple[list[Segment], list[int], list[int]]:
        """Segments, tokens and positions of a verify pass."""
        segments, token_ids, positions = [], list[int](), list[int]()
        for part in rows:
            length = self.slots.lengths[part.slot]
            segments.append(tree_segment(part.slot, length, part.proposal.row_parents, CPU))
            token_ids += [part.root_id, *part.proposal.token_ids]
            positions += [length, *(length + depth for depth in part.proposal.depths)]
        return segments, token_ids, positions

    def logits_after(
        self, segments: Sequence[Segment], token_ids: list[int], positions: list[int], wanted: Sequence[int]
    ) -> Tensor:
        """Logits [wanted, vocabulary] fp32 of rows anywhere behind the committed ones; it commits nothing."""
        return self.head(self._forward(segments, token_ids, positions)[list(wanted)])

    def select_features(self, layers: Sequence[str]) -> None:
        """Capture these layers from now on."""
        self.tap.select(layers)

    def keep(self, slot: int, rows: Sequence[int]) -> None:
        """Commit a path of the last verify pass."""
        self.slots.keep(slot, rows)

    def read_rows(self, slot: int, start: int, stop: int) -> tuple[Tensor, ...]:
        """Copies of committed rows."""
        return self.slots.read_rows(slot, start, stop)

    def write_rows(self, slot: int, rows: Sequence[Tensor]) -> None:
        """Commit rows read earlier."""
        self.slots.write_rows(slot, rows)

    def release(self, slot: int) -> None:
        """Empty a slot."""
        self.slots.release(slot)

    def embedding(self) -> Tensor:
        """[vocabulary, hidden]."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    def lm_head(self) -> Tensor:
        """[vocabulary, hidden]."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @torch.inference_mode()
    def _forward(self, segments: Sequence[Segment], token_ids: list[int], positions: list[int]) -> Tensor:
        """The vectors [rows, hidden] after the final norm."""
        for segment in segments:
            self.slots.check(segment)
        row_pass = RowPass(self.slots, segments)
        output = self.model.base_model(
            input_ids=torch.tensor([token_ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            use_cache=False,
            row_pass=row_pass,
        )
        row_pass.check(self.info.architecture)
        last: Tensor = output.last_hidden_state[0]
        return last

    def self_check(self) -> None:
        """Refuse an architecture whose rows are not independent or whose logits are not the head's product.

        Two short passes: a root with two children must give the second child what it gets alone behind the root, and
        the model's own forward must give the same logits.
        """
        ids = [1 % self.info.vocab_size, 2 % self.info.vocab_size, 3 % self.info.vocab_size]
        tree = self._forward([tree_segment(0, 0, [-1, 0, 0], self.device)], ids, [0, 1, 1])[2:]
        chain = [causal_segment(0, 0, 2)]
        alone = self._forward(chain, [ids[0], ids[2]], [0, 1])[1:]
        with torch.inference_mode():
            whole = self.model(
                input_ids=torch.tensor([[ids[0], ids[2]]], device=self.device),
                position_ids=torch.tensor([[0, 1]], device=self.device),
                use_cache=False,
                row_pass=RowPass(self.slots, chain),
            ).logits[0, 1:]
        tolerance = 1e-3 if self.info.weights == "fp32" else 0.1
        for what, got in (("its rows are not independent", tree), ("its logits are not those of its LM head", alone)):
            if not torch.allclose(self.head(got), whole.float(), atol=tolerance, rtol=tolerance):
                raise TargetError(f"{self.info.architecture} cannot be a target: {what}")
