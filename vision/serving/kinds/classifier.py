"""Classifiers: which of its classes an image shows, the likeliest first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from vision.data.view import centre_crop
from vision.images import LabelledBox, Picture, draw_boxes
from vision.serving.answers import CLASS_ID, CLASS_NAME, SCORE, record, several
from vision.serving.folder import BACKBONE
from vision.serving.protocol import Answer, Answering, Ask, Card, Kind, Model, Options, Traced, option

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ClassificationOptions(Options):
    """How much of the answer is wanted."""

    top_k: int = option(5, "Classes to name, the likeliest first.", ge=1, le=1000)


@dataclass(frozen=True)
class ClassifierCard(Card):
    """``resize``: pixels of the short side, of which the middle square of ``image_size`` is looked at."""

    resize: int


class ClassifierKind(Kind):
    """Answers ``{"classifications": [{class_id, class_name, score}, ...]}``; scores of all classes add up to 1."""

    name: ClassVar = "classifier"
    format: ClassVar = BACKBONE
    route: ClassVar = "classifications"
    noun: ClassVar = "vision.classification"
    id_prefix: ClassVar = "cls"
    summary: ClassVar = "Say which of its classes an image shows, the likeliest first."
    options: ClassVar = ClassificationOptions
    schema: ClassVar = record(
        classifications=several("The likeliest first.", record(class_id=CLASS_ID, class_name=CLASS_NAME, score=SCORE))
    )

    def read_card(self, config: Mapping[str, Any], digest: str) -> ClassifierCard:
        """See ``Kind``; classes without names go by their numbers."""
        names = tuple(config["class_names"]) or tuple(str(index) for index in range(config["num_classes"]))
        view = config["preprocessing"]
        licence, description = config.get("licence", "unknown"), config.get("description", "")
        return ClassifierCard(names, licence, view["image_size"], description, digest, view["resize"])

    def module(self, folder: Path) -> nn.Module:
        """See ``Kind``."""
        from vision.backbones.checkpoint import load_backbone
        from vision.backbones.traced import NormalizedClassifier

        return NormalizedClassifier(load_backbone(folder))

    def trace(self, folder: Path, image_size: int | None = None) -> Traced:
        """See ``Kind``."""
        from vision.backbones.traced import trace_classifier

        return trace_classifier(folder, image_size)

    def answer(self, model: Model, picture: Picture, options: ClassificationOptions) -> Answering:
        """See ``Kind``."""
        card: ClassifierCard = model.card
        pixels = np.asarray(centre_crop(picture.image, card.resize, card.image_size)).transpose(2, 0, 1)[None]
        del picture
        logits = (yield Ask(model.network, pixels))[0][0].astype(np.float64)
        odds = np.exp(logits - logits.max())
        scores = odds / odds.sum()
        return {
            "classifications": [
                {
                    "class_id": int(index),
                    "class_name": card.class_names[index],
                    "score": round(float(scores[index]), 5),
                }
                for index in np.argsort(-scores, kind="stable")[: options.top_k]
            ]
        }

    def draw(self, image: Image.Image, answer: Answer) -> Image.Image:
        """A frame with the likeliest class."""
        best = answer["classifications"][0]
        label = f"{best['class_name']} {best['score']:.2f}"
        return draw_boxes(image, [LabelledBox((0, 0, image.width - 1, image.height - 1), label, best["class_id"])])

    def rows(self, answer: Answer) -> list[Answer]:
        """Class and score."""
        return [{"class": entry["class_name"], "score": entry["score"]} for entry in answer["classifications"]]


KIND = ClassifierKind()
