"""The Dovetail drafter on the native CPU kernels: a tree is one call, whatever its depth and the number of requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafters.checkpoint import read_config, read_network
from drafters.dgf import DynamicGatingFusion
from drafters.drafter import DrafterError, Observation
from drafters.feature_drafter import FeatureDrafter, check_fit
from drafters.network import DovetailNetwork, FeatureNetwork, LlamaBlock, rotary_table
from drafters.proposal import Budget, Proposal
from kernels import native
from kernels.decoder_layer import LayerForm, LayerStack, PackedDecoderLayer
from kernels.draft_tree import DraftModel, GrownTree, PackedFusion, gated_fusion, linear_fusion
from kernels.linear_lowbit import PackedWeight, linear, pack
from kernels.tree_attention import KVSlots

GROUP_SIZE = 32
BITS = 8  # half the bytes of bf16; on the bundled pair it costs no acceptance


class NotNative(DrafterError):
    """The drafter computes something that the native kernels do not; the torch network is the way then."""


class NativeDrafter(FeatureDrafter):
    """The same drafts as ``DovetailDrafter`` up to rounding, on the CPU, with weights of 8, 16 (bf16) or 32 bits.

    ``embedding`` [V, H] is read as the target holds it, fp32 or bf16, without a copy; the LM head's rows that can be
    drafted are packed. The fusion's and blocks' weights are packed, so the network may be dropped afterwards.
    """

    def __init__(
        self, network: FeatureNetwork, embedding: Tensor, lm_head: Tensor, bits: int, num_slots: int, capacity: int
    ) -> None:
        """Errors: NotNative, saying why; DrafterError where the drafter does not fit the target."""
        config = network.config
        check_fit(config, embedding, lm_head)
        if not isinstance(network, DovetailNetwork):
            raise NotNative(f"{type(network).__name__} has no native form")
        if native.library() is None:
            raise NotNative("the native kernels are not built")
        if config.head_dim % 16 or (
            bits <= 8 and (config.hidden_size % GROUP_SIZE or config.intermediate_size % GROUP_SIZE)
        ):
            raise NotNative(
                f"hidden size {config.hidden_size}, intermediate size {config.intermediate_size} and heads of "
                f"{config.head_dim}; the native kernels take multiples of {GROUP_SIZE} and of 16"
            )
        cpu = embedding.device
        slots = KVSlots(
            num_slots, capacity, config.num_blocks, config.num_kv_heads, config.head_dim, torch.float32, cpu
        )
        super().__init__(config, network.feature_layers, slots, torch.zeros(num_slots, config.hidden_size))
        several = network.feature_proj
        self.projection = None if several is None else pack(several.weight.detach(), bits, GROUP_SIZE)
        cosine, sine = rotary_table(config, capacity, torch.float32, cpu)
        half = config.head_dim // 2
        self.model = DraftModel(
            fusion=pack_fusion(network.fusion, bits),
            stack=LayerStack([pack_block(block, bits) for block in network.blocks]),
            head=pack(network.select_head(lm_head).detach(), bits, GROUP_SIZE),
            embedding=embedding.detach().contiguous(),
            draft_ids=network.draft_ids,
            confidence=confidence_vector(network.confidence_proj),
            cosine=cosine,
            sine=torch.cat((sine[:, half:], sine[:, half:]), dim=-1),  # the sign is not folded in here
            slots=slots,
        )

    def grow(self, slots: Sequence[int], budget: Budget) -> list[Proposal]:
        """One tree for each slot."""
        trees = self.model.grow(slots, self.last_outputs, budget.rows, budget.top_k, budget.depth)
        return [as_proposal(tree) for tree in trees]

    def extend(self, batch: Sequence[Observation]) -> None:
        """Rows of all requests in one pass."""
        slots = [observation.slot for observation in batch]
        num_rows = [len(observation.next_ids) for observation in batch]
        next_ids = [token_id for observation in batch for token_id in observation.next_ids]
        features = batch[0].features if len(batch) == 1 else torch.cat([observation.features for observation in batch])
        features = features.float()
        if self.projection is not None:
            features = linear(features, self.projection)
        self.model.observe(slots, num_rows, next_ids, features, self.last_outputs)


def as_proposal(tree: GrownTree) -> Proposal:
    """The same nodes."""
    parents = tuple(None if parent < 0 else parent for parent in tree.parents)
    return Proposal(tuple(tree.token_ids), parents, tuple(tree.log_probs))


def pack_fusion(fusion: Any, bits: int) -> PackedFusion:
    """``DynamicGatingFusion`` or ``LinearFusion``, packed."""
    if isinstance(fusion, DynamicGatingFusion):
        weights = (fusion.feature_proj.weight, fusion.embedding_proj.weight, fusion.gate_proj.weight)
        epsilon = fusion.embedding_norm.eps
        assert epsilon is not None
        feature, token, gate = (pack(weight.detach(), bits, GROUP_SIZE) for weight in weights)
        return gated_fusion(feature, token, gate, fusion.embedding_norm.weight, epsilon)
    return linear_fusion(pack(fusion.proj.weight.detach(), bits, GROUP_SIZE), fusion.proj.bias)


def pack_block(module: Any, bits: int) -> PackedDecoderLayer:
    """A ``LlamaBlock``, packed; block 0 has no norm before its attention."""
    block: LlamaBlock = module
    norm = None if block.index == 0 else block.attention_norm.weight
    bias = block.qkv_proj.bias

    def packed(projection: nn.Linear) -> PackedWeight:
        return pack(projection.weight.detach(), bits, GROUP_SIZE)

    return PackedDecoderLayer(
        qkv=(packed(block.qkv_proj),),
        output=packed(block.output_proj),
        gate_up=(packed(block.gate_up_proj),),
        down=packed(block.down_proj),
        input_norm=None if norm is None else vector(norm),
        post_norm=vector(block.mlp_norm.weight),
        qkv_bias=None if bias is None else vector(bias),
        form=LayerForm(
            block.num_heads, block.num_kv_heads, block.head_dim, float(block.mlp_norm.eps or 0.0), block.head_dim**-0.5
        ),
    )


def vector(values: Any) -> Tensor:
    """fp32, on its own."""
    copied: Tensor = values.detach().float().clone()
    return copied


def confidence_vector(projection: nn.Linear | None) -> Tensor | None:
    """Weights and bias of the confidence behind one another, [H + 1]; None where there is none."""
    return None if projection is None else vector(torch.cat((projection.weight[0], projection.bias)))


def load_native(
    folder: Path, embedding: Tensor, lm_head: Tensor, num_slots: int, capacity: int, bits: int = BITS
) -> NativeDrafter:
    """A drafter folder on the native kernels. Errors: NotNative; DrafterError, naming the file or both shapes."""
    check_fit(read_config(folder), embedding, lm_head)
    network = read_network(folder, embedding.device, torch.float32)
    return NativeDrafter(network, embedding, lm_head, bits, num_slots, capacity)
