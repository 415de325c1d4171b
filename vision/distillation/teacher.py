"""Teachers: frozen networks of any origin, asked for logits and an embedding of a batch of byte images.

A teacher normalises its images itself, so that it may want other constants than its student; both see the same crop.
It is no module of the task that trains the student: it is neither saved with it, nor trained, nor put into training
mode.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.training import RecipeError
from vision.backbones.checkpoint import load_backbone
from vision.backbones.preprocessing import Normalization

Ask = Callable[[Tensor], tuple[Tensor, Tensor]]


class TeacherError(ValueError):
    """A teacher cannot be loaded, or does not fit the student's classes."""


@dataclass(frozen=True)
class TeacherOptions:
    """A recipe's ``[teacher]`` table.

    ``kind`` "backbone" is a folder that a trainer of ours saved, "transformers" a folder of an image classifier of that
    library. With ``cache``, a folder, the teacher is asked once for every image instead of once a step, and its answers
    are kept there for all runs that name it; possible only where every epoch shows the same images: no augmentation.
    """

    path: str
    kind: str = "backbone"
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ADAPTERS:
            raise RecipeError(f"teacher.kind is {self.kind!r}; allowed are {', '.join(ADAPTERS)}")


class Teacher:
    """A frozen network. ``ask`` maps normalised images [B, 3, H, W] to (logits [B, C, ...], embedding [B, D]).

    ``class_names`` is empty where the network does not name its classes.
    """

    def __init__(
        self,
        network: nn.Module,
        ask: Ask,
        normalize: Callable[[Tensor], Tensor],
        num_classes: int,
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.ask = ask
        self.normalize = normalize
        self.num_classes = num_classes
        self.class_names = class_names

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes [B, 3, H, W] -> logits and embedding, in float32 and without a graph.

        Errors: TeacherError where the network answers NaN or infinity.
        """
        # Whoever holds the task may have called train() on everything it could reach.
        self.network.to(images.device).eval()
        logits, embedding = self.ask(self.normalize(images.float() / 255))
        if not torch.isfinite(logits).all():
            raise TeacherError("the teacher's logits are not finite; its weights or its normalisation are not its own")
        return logits.float(), embedding.float()

    def fingerprint(self) -> str:
        """A digest of the weights, kept beside what was distilled from them."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def check_classes(self, class_names: tuple[str, ...]) -> None:
        """Refuse a student with other classes. Errors: TeacherError."""
        if self.num_classes != len(class_names):
            raise TeacherError(f"the teacher has {self.num_classes} classes, the student's data {len(class_names)}")
        if self.class_names and self.class_names != class_names:
            differing = sorted(set(self.class_names) ^ set(class_names)) or ["their order"]
            raise TeacherError(
                f"the teacher was trained for other classes than the data's; they differ in {differing[:10]}"
            )


def backbone_teacher(folder: Path) -> Teacher:
    """One of our backbones with its classifier. Errors: CheckpointError."""
    network = load_backbone(folder)

    def ask(images: Tensor) -> tuple[Tensor, Tensor]:
        embedding = network.embed(images)
        return network.classify(embedding), embedding

    return Teacher(network, ask, network.normalization, network.num_classes, network.class_names)


def transformers_teacher(folder: Path) -> Teacher:
    """An image classifier saved by ``transformers``; safetensors only. The embedding is its pooled last hidden state.

    Errors: TeacherError where the folder holds no such model.
    """
    from transformers import AutoModelForImageClassification

    try:
        network = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TeacherError(f"{folder} holds no image classifier of transformers: {error}") from error

    def ask(images: Tensor) -> tuple[Tensor, Tensor]:
        answer = network(pixel_values=images, output_hidden_states=True)
        last: Tensor = answer.hidden_states[-1]
        # Token models answer [B, tokens, D], convolutional ones [B, D, H, W].
        embedding = last.mean(dim=1) if last.ndim == 3 else last.flatten(2).mean(dim=2)
        return answer.logits, embedding

    names = network.config.id2label
    class_names = tuple(str(names[index]) for index in range(len(names)))
    # Without names of its own the library numbers the classes.
    known = not all(name.startswith("LABEL_") for name in class_names)
    return Teacher(network, ask, read_normalization(folder), len(class_names), class_names if known else ())


def read_normalization(folder: Path) -> Normalization:
    """Mean and deviation from ``preprocessor_config.json``. Errors: TeacherError."""
    file = folder / "preprocessor_config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return Normalization(tuple(config["image_mean"]), tuple(config["image_std"]))
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(f"{file} must give image_mean and image_std: {error}") from error


ADAPTERS: dict[str, Callable[[Path], Teacher]] = {"backbone": backbone_teacher, "transformers": transformers_teacher}


def load_teacher(options: TeacherOptions) -> Teacher:
    """The teacher a recipe names. Errors: CheckpointError, TeacherError."""
    return ADAPTERS[options.kind](Path(options.path).expanduser())
