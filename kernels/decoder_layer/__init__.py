"""Decoder layers for the rows of several slots in one native call, and what is read off an LM head.

Eager torch spends 0.4 to 0.6 ms a layer around the products; here all layers of a pass are one call.
`pack_decoder_layer` and `LayerStack` once at load, `LayerPass` and `decoder_layers` once a forward pass. transformers'
own layer is the slow twin, in the tests.
"""

from kernels.decoder_layer.cpu import LayerPass, LayerStack, decoder_layers, head_argmax, head_top_k, normalise
from kernels.decoder_layer.form import (
    LayerForm,
    Norm,
    UnsupportedLayer,
    layer_form,
    layer_parts,
    model_type,
    rotary_kinds,
)
from kernels.decoder_layer.packed import (
    PackedDecoderLayer,
    assemble_decoder_layer,
    layer_from_tensors,
    layer_tensors,
    pack_decoder_layer,
    packing_errors,
    unpack_decoder_layer,
)

__all__ = [
    "LayerForm",
    "LayerPass",
    "LayerStack",
    "Norm",
    "PackedDecoderLayer",
    "UnsupportedLayer",
    "assemble_decoder_layer",
    "decoder_layers",
    "head_argmax",
    "head_top_k",
    "layer_form",
    "layer_from_tensors",
    "layer_parts",
    "layer_tensors",
    "model_type",
    "normalise",
    "pack_decoder_layer",
    "packing_errors",
    "rotary_kinds",
    "unpack_decoder_layer",
]
