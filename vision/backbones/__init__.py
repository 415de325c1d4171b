"""Compact backbones. ``create_backbone("snet49")`` builds one; ``vision.backbones.checkpoint`` saves and loads them."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from vision.backbones.backbone import Backbone, BackboneError, UnknownBackboneError

BACKBONES: dict[str, str] = {
    "snet49": "vision.backbones.snet:SNet",
    "snet146": "vision.backbones.snet:SNet",
    "snet535": "vision.backbones.snet:SNet",
    "shufflenet_v2_x0_5": "vision.backbones.shufflenet_v2:ShuffleNetV2",
    "shufflenet_v2_x1_0": "vision.backbones.shufflenet_v2:ShuffleNetV2",
    "shufflenet_v2_x1_5": "vision.backbones.shufflenet_v2:ShuffleNetV2",
    "shufflenet_v2_x2_0": "vision.backbones.shufflenet_v2:ShuffleNetV2",
    "menet_108_8x1_g3": "vision.backbones.menet:MENet",
    "menet_128_8x1_g4": "vision.backbones.menet:MENet",
    "menet_160_8x1_g8": "vision.backbones.menet:MENet",
    "menet_228_12x1_g3": "vision.backbones.menet:MENet",
    "menet_256_12x1_g4": "vision.backbones.menet:MENet",
    "menet_352_12x1_g8": "vision.backbones.menet:MENet",
    "menet_348_12x1_g3": "vision.backbones.menet:MENet",
    "menet_456_24x1_g3": "vision.backbones.menet:MENet",
    "menet_120_0x1_g3": "vision.backbones.menet:MENet",
    "fd_mobilenet_x1_0": "vision.backbones.fd_mobilenet:FDMobileNet",
    "fd_mobilenet_x0_75": "vision.backbones.fd_mobilenet:FDMobileNet",
    "fd_mobilenet_x0_5": "vision.backbones.fd_mobilenet:FDMobileNet",
    "fd_mobilenet_x0_25": "vision.backbones.fd_mobilenet:FDMobileNet",
    "mobilenet_v1_x1_0": "vision.backbones.mobilenet:MobileNet",
    "mobilenet_v1_x0_75": "vision.backbones.mobilenet:MobileNet",
    "mobilenet_v1_x0_5": "vision.backbones.mobilenet:MobileNet",
    "mobilenet_v1_x0_25": "vision.backbones.mobilenet:MobileNet",
    "mobilenet_v1_x0_125": "vision.backbones.mobilenet:MobileNet",
    "plain_w6": "vision.backbones.plain:Plain",
    "plain_w12": "vision.backbones.plain:Plain",
    "plain_w32": "vision.backbones.plain:Plain",
}

__all__ = ["Backbone", "BackboneError", "UnknownBackboneError", "create_backbone", "list_backbones"]


def list_backbones() -> list[str]:
    """Every name ``create_backbone`` knows."""
    return list(BACKBONES)


def backbone_class(path: str) -> type[Backbone]:
    """The class that ``module:Class`` names."""
    module, _, attribute = path.partition(":")
    return cast("type[Backbone]", getattr(import_module(module), attribute))


def create_backbone(name: str, num_classes: int = 1000) -> Backbone:
    """A freshly initialised network with ``num_classes`` outputs. Errors: UnknownBackboneError."""
    if name not in BACKBONES:
        raise UnknownBackboneError(f"no backbone is called {name!r}; known are {', '.join(BACKBONES)}")
    network = backbone_class(BACKBONES[name])
    return network(network.variants[name], num_classes)
