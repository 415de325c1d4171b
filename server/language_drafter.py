"""A small language model as a drafter, loaded like a target: a folder or a GGUF file, native where the layers are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from drafters.drafter import DrafterError, DraftState
from drafters.proposal import Budget
from drafters.small_lm import SmallLMDrafter
from server.own_models import is_gguf
from server.placement.devices import Placement
from server.targets.checkpoint import context_limit
from server.targets.gguf.loading import load_gguf_target
from server.targets.loading import model_config, transformers_model
from server.targets.native_target import load_target as load_folder
from server.targets.torch_target import TorchTarget


def load_language_drafter(
    path: Path, vocab_size: int, place: Placement, num_slots: int, capacity: int
) -> SmallLMDrafter:
    """The model in ``path`` as a drafter for a target with ``vocab_size`` tokens; its weights as stored on the CPU.

    It proposes nothing beyond the positions that it has. Errors: DrafterError for what cannot be loaded or run.
    """
    try:
        capacity = min(capacity, context_limit(model_config(path), path))
        drafter = SmallLMDrafter(load_model(path, place, num_slots, capacity), vocab_size)
    except ValueError as error:  # of targets, packed files, kernels
        raise DrafterError(f"{path} cannot be a drafter: {error}") from error
    (probe,) = drafter.propose([DraftState(0, [0, 1])], Budget(rows=2, top_k=1, depth=0))
    drafter.release(0)
    if len(probe) != 1:
        raise DrafterError(f"{path} cannot be a drafter: its forward pass gave no logits for the row asked for")
    return drafter


def load_model(path: Path, place: Placement, num_slots: int, capacity: int) -> TorchTarget:
    """The model in its place. Errors: TargetError, PackedFormatError."""
    if place.device.type == "cpu":
        load = load_gguf_target if is_gguf(path) else load_folder
        return load(path, None, num_slots, capacity)
    model = transformers_model(path, place.dtype).to(place.device)
    return TorchTarget.checked(model, path.name, str(place.dtype).removeprefix("torch."), num_slots, capacity)


def check_vocabulary(own: Mapping[str, int], wanted: Mapping[str, int], name: str, target_name: str) -> None:
    """Refuse a model whose token ids mean other text than the target's, or that lacks some of them.

    ``own`` and ``wanted``: ids by token, added ones included. Errors: DrafterError with the first id that differs.
    """
    by_id, wanted_by_id = ({i: token for token, i in tokens.items()} for tokens in (own, wanted))
    first = next((i for i in sorted(wanted_by_id) if by_id.get(i) != wanted_by_id[i]), None)
    if first is not None:
        raise DrafterError(
            f"{name} has another vocabulary than {target_name}: token {first} is {by_id.get(first)!r} there and "
            f"{wanted_by_id[first]!r} in the target ({len(own)} and {len(wanted)} tokens); a drafting language model "
            "must share the target's tokenizer"
        )
