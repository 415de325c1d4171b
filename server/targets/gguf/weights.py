"""The weights of a GGUF file under transformers' names: exact values, rows in transformers' order."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType, LlamaFileType
from gguf.tensor_mapping import get_tensor_name_map
from torch import Tensor, nn

from kernels.linear_lowbit import PackedWeight, QuantisedWeight, pack, pack_quantised
from server.targets.checkpoint import tell_unused
from server.targets.gguf.blocks import DECODERS, FLOATS, decode
from server.targets.gguf.configuration import LONG_FACTORS, SHORT_FACTORS, BeyondNative, architecture
from server.targets.gguf.header import GGUFFile, StoredTensor
from server.targets.target import TargetError

FLOAT_LAYOUTS = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2", GGMLQuantizationType.BF16: "<i2"}
ROWS_AT_ONCE = 4096
FACTORS = "rope_freqs.weight"
Matrix = Tensor | QuantisedWeight


class GGUFWeights:
    """Reads tensor by tensor from the mapped file. Errors: TargetError naming what is missing or does not fit."""

    def __init__(self, file: GGUFFile, config: Any) -> None:
        """Every tensor's type is checked here, before anything is read."""
        self.file, self.config = file, config
        self.architecture = architecture(file)
        self.names = get_tensor_name_map(self.architecture.model, config.num_hidden_layers)
        self.num_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        self.unused = set(file.tensors) - {FACTORS, LONG_FACTORS, SHORT_FACTORS}
        for tensor in file.tensors.values():
            if tensor.kind not in DECODERS and tensor.kind not in FLOATS:
                known = ", ".join(kind.name for kind in (*FLOATS, *DECODERS))
                raise BeyondNative(
                    f"{file.path}: the tensor {tensor.name} is of type {tensor.kind.name}; known are {known}"
                )

    def __contains__(self, name: str) -> bool:
        """Whether the file stores this parameter of transformers' model."""
        return self.names.get_name(name, try_suffixes=(".weight", ".bias")) in self.file.tensors

    def stored(self, name: str, shape: Sequence[int] | None = None) -> StoredTensor:
        """The file's tensor for a parameter of transformers' model, which must have this shape."""
        mapped = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None or mapped not in self.file.tensors:
            raise TargetError(f"{self.file.path} lacks the tensor {mapped or name}")
        tensor = self.file.tensors[mapped]
        if shape is not None and tensor.shape != tuple(shape):
            raise TargetError(
                f"{self.file.path}: the tensor {mapped} is {list(tensor.shape)}, the metadata describe {list(shape)}"
            )
        return tensor

    def matrix(self, name: str, shape: Sequence[int] | None = None) -> Matrix:
        """A parameter as it is stored: codes and scales, or floats in the file's own precision."""
        tensor = self.stored(name, shape)
        self.unused.discard(tensor.name)
        order = self.row_order(name, tensor.shape[0])
        if tensor.kind in FLOATS:
            values = read_floats(tensor)
            return values if order is None else values[order]
        weight = read_codes(tensor)
        return weight if order is None else rows_of(weight, order)

    def read(self, name: str, shape: Sequence[int] | None = None) -> Tensor:
        """A parameter's values: fp32, or bf16 where the file holds that. Some rows at a time are taken apart."""
        tensor = self.stored(name, shape)
        self.unused.discard(tensor.name)
        if tensor.kind in FLOATS:
            values = read_floats(tensor)
            values = values if values.dtype == torch.bfloat16 else values.float()
        else:
            values = torch.empty(tensor.shape)
            for begin in range(0, tensor.shape[0], ROWS_AT_ONCE):
                part = values[begin : begin + ROWS_AT_ONCE]
                part.copy_(read_codes(rows_between(tensor, begin, begin + len(part))).dequantise())
        self.file.forget_pages()
        if self.architecture.norm_offset and name.endswith("norm.weight"):
            values = values.float() - self.architecture.norm_offset
        order = self.row_order(name, tensor.shape[0])
        return values if order is None else values[order]

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype | None = None) -> None:
        """Give ``module``, which the whole model knows as ``prefix``, all its weights."""
        for name, parameter in list(module.named_parameters()):
            set_parameter(module, name, self.read(f"{prefix}.{name}", parameter.shape).to(dtype))

    def tell_unused(self) -> None:
        """Name the tensors that nothing read."""
        tell_unused(self.file.path, sorted(self.unused))

    def row_order(self, name: str, num_rows: int) -> Tensor | None:
        """Where transformers' rows of q and k lie in the file: both halves of a head apart, there side by side."""
        part = name.split(".")[-2]
        if not self.architecture.permuted or part not in self.num_heads:
            return None
        order = torch.arange(num_rows).reshape(self.num_heads[part], -1, 2)
        return order.transpose(1, 2).flatten()

    def rope_factors(self) -> Tensor | None:
        """[head size / 2] what each rotary frequency is divided by, where the file says so."""
        tensor = self.file.tensors.get(FACTORS)
        return None if tensor is None else read_floats(tensor).float()


def set_parameter(module: nn.Module, name: str, values: Tensor) -> None:
    """Replace a parameter, frozen."""
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, nn.Parameter(values, requires_grad=False))


def read_floats(tensor: StoredTensor) -> Tensor:
    """A tensor of a float type, in that type."""
    values = torch.from_numpy(tensor.data.view(FLOAT_LAYOUTS[tensor.kind]).copy())
    return (values.view(torch.bfloat16) if tensor.kind is GGMLQuantizationType.BF16 else values).reshape(tensor.shape)


def read_any(file: GGUFFile, name: str) -> Tensor:
    """A matrix in fp32, of whatever type gguf-py can turn into numbers. Errors: TargetError."""
    tensor = file.tensors.get(name)
    if tensor is None:
        raise TargetError(f"{file.path} lacks the tensor {name}")
    try:
        values = quants.dequantize(tensor.data, tensor.kind)
    except NotImplementedError as error:
        raise TargetError(f"{file.path}: the tensor {name} is of type {tensor.kind.name}, which is not read") from error
    return torch.from_numpy(values.astype(np.float32).reshape(tensor.shape))


def file_weights(file: GGUFFile) -> str:
    """What most matrices of the file are held in, as llama.cpp calls it: ``Q4_K_M``."""
    names = {kind.value: kind.name for kind in LlamaFileType}
    name: str = names.get(file.get("general.file_type", int, -1), "GGUF")
    return name.removeprefix("MOSTLY_")


def rows_between(tensor: StoredTensor, begin: int, end: int) -> StoredTensor:
    """Rows begin .. end-1 of a tensor."""
    row_bytes = len(tensor.data) // tensor.shape[0]
    shape, data = (end - begin, *tensor.shape[1:]), tensor.data[begin * row_bytes : end * row_bytes]
    return StoredTensor(tensor.name, shape, tensor.kind, data)


def read_codes(tensor: StoredTensor) -> QuantisedWeight:
    """A matrix of blocks as codes, scales and minima."""
    if len(tensor.shape) != 2:
        raise TargetError(f"the tensor {tensor.name} {list(tensor.shape)} of type {tensor.kind.name} is no matrix")
    groups = decode(tensor.kind, tensor.data)
    rows, columns = tensor.shape
    scale = torch.from_numpy(groups.scale).reshape(rows, -1)
    minimum = None if groups.minimum is None else torch.from_numpy(groups.minimum).reshape(rows, -1)
    codes = torch.from_numpy(groups.codes).reshape(rows, columns)
    return QuantisedWeight(codes, scale, minimum, groups.bits, columns // scale.shape[1], groups.table)


def rows_of(weight: QuantisedWeight, order: Tensor) -> QuantisedWeight:
    """The same rows in another order."""
    minimum = None if weight.minimum is None else weight.minimum[order]
    return dataclasses.replace(weight, codes=weight.codes[order], scale=weight.scale[order], minimum=minimum)


def pack_parts(parts: Sequence[Matrix]) -> tuple[PackedWeight, ...]:
    """Matrices that read the same input, exact and in order: neighbours of one format become one packed matrix."""
    return tuple(_pack_alike(list(alike)) for _, alike in itertools.groupby(parts, _format))


def _format(part: Matrix) -> tuple[Any, ...]:
    if isinstance(part, QuantisedWeight):
        return part.bits, part.group_size, part.minimum is None, part.scale.dtype, part.table
    return (16 if part.dtype == torch.bfloat16 else 32,)


def _pack_alike(parts: Sequence[Matrix]) -> PackedWeight:
    quantised = [part for part in parts if isinstance(part, QuantisedWeight)]
    floats = [part for part in parts if isinstance(part, Tensor)]
    if floats:
        return pack(
            torch.cat([part if part.dtype == torch.bfloat16 else part.float() for part in floats]), *_format(floats[0])
        )
    if len(quantised) == 1:
        return pack_quantised(quantised[0])
    minima = [part.minimum for part in quantised if part.minimum is not None]
    whole = dataclasses.replace(
        quantised[0],
        codes=torch.cat([part.codes for part in quantised]),
        scale=torch.cat([part.scale for part in quantised]),
        minimum=torch.cat(minima) if minima else None,
    )
    return pack_quantised(whole)
