"""A whole Llama-like decoder layer for the rows of several slots in one native call, and the LM head's arg-max.

Eager torch spends 0.4 to 0.6 ms a layer around the products; here a layer is one call. `pack_decoder_layer` once at
load, `LayerPass` once a forward pass, `decoder_layer` once a layer. transformers' own layer is the slow twin, in the
tests.
"""

from kernels.decoder_layer.cpu import LayerPass, decoder_layer, head_argmax
from kernels.decoder_layer.packed import (
    PackedDecoderLayer,
    UnsupportedLayer,
    check_layer,
    layer_from_tensors,
    layer_tensors,
    pack_decoder_layer,
    packing_errors,
    unpack_decoder_layer,
)

__all__ = [
    "LayerPass",
    "PackedDecoderLayer",
    "UnsupportedLayer",
    "check_layer",
    "decoder_layer",
    "head_argmax",
    "layer_from_tensors",
    "layer_tensors",
    "pack_decoder_layer",
    "packing_errors",
    "unpack_decoder_layer",
]
