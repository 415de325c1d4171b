"""Face photographs of known people as aligned 112 x 112 crops: the London set and ORL. No torch here.

People numbered ``WITHHELD_FROM`` and above in the London set are for evaluation alone; no split for training contains
them. ORL has no formal licence and may only be measured with.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vision.data.degradations import DEGRADATIONS, degrade
from vision.data.sources import DataError, ImageSource, UnreadableImageError, read_image
from vision.face_quality.alignment import align_face, fit_similarity, inter_eye_distance

WITHHELD_FROM = 130
LONDON_SPLITS = {"train": (1, 109), "val": (110, 129), "trainable": (1, 129), "withheld": (WITHHELD_FROM, 999)}
FOLD = re.compile(r"fold_(\d+(?:\+\d+)*)_of_(\d+)")
# Among the 189 landmarks: both pupils, both sides of the nose's tip, both corners of the mouth.
PUPILS, NOSE, MOUTH = (0, 1), (54, 60), (87, 93)
# Where the landmarks of ORL's pictures of 92 x 112 lie on average, read off their mean; single ones stray by 5 pixels.
ORL_LANDMARKS = np.array([[29.5, 51.0], [62.0, 51.5], [46.0, 70.0], [34.0, 86.0], [58.0, 86.5]])
# Landmarks are searched for with this many pixels between the eyes, within this share of that distance.
SEARCH_EYE_DISTANCE, SEARCH_RANGE, PATCH_SHARE = 40.0, 0.7, 0.3


@dataclass(frozen=True)
class Photo:
    """A face photograph and the person's groups. ``twin``: the one with landmarks, itself or of its session."""

    file: Path
    twin: Path | None = None
    groups: dict[str, str] = field(default_factory=dict)


class FaceSource:
    """An ``ImageSource`` of aligned crops; ``class_names`` are people, ``photos`` what the crops were made from."""

    def __init__(self, photos: Sequence[Photo], people: Sequence[str]) -> None:
        if not photos:
            raise DataError("the split holds no photograph")
        self.photos = tuple(photos)
        self.class_names = tuple(sorted(set(people)))
        places = {name: place for place, name in enumerate(self.class_names)}
        self.labels: NDArray[np.int64] = np.array([places[name] for name in people], dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        """The aligned crop. Errors: UnreadableImageError, also where the landmarks cannot be used."""
        file = self.photos[index].file
        image = read_image(file)
        try:
            return align_face(image, self.landmarks(index, image))
        except (ValueError, OSError) as error:
            raise UnreadableImageError(f"{file} cannot be aligned ({error})") from error

    def landmarks(self, index: int, image: Image.Image) -> NDArray[np.float64]:
        """Five landmarks [5, 2] of the photograph ``image``. Errors: DataError, LandmarkError."""
        photo = self.photos[index]
        if photo.twin is None:
            return ORL_LANDMARKS
        landmarks = read_landmarks(photo.twin.with_suffix(".pts.txt"))
        return landmarks if photo.twin == photo.file else carry_landmarks(read_image(photo.twin), landmarks, image)


class DegradedFaces:
    """Every image of ``source`` as it is and ``copies`` times with one defect: an ``ImageSource``.

    Image ``copies + 1`` times the source's index is the undegraded one. Kinds take turns, severities are uniform;
    both are functions of seed and index alone.
    """

    def __init__(self, source: ImageSource, copies: int, seed: int = 0) -> None:
        if copies < 0:
            raise DataError(f"copies is {copies}; it must be at least 0")
        self.source, self.copies, self.seed = source, copies, seed
        self.class_names = source.class_names
        self.labels: NDArray[np.int64] = np.repeat(source.labels, copies + 1)
        self.originals: NDArray[np.int64] = np.repeat(np.arange(len(source.labels)), copies + 1)
        count = len(self.labels)
        self.kinds = tuple(self._kind(index) for index in range(count))
        severities = np.random.default_rng((seed, count)).random(count)
        self.severities: NDArray[np.float64] = np.where(np.array(self.kinds) == "none", 0.0, severities)

    def _kind(self, index: int) -> str:
        photo, copy = divmod(index, self.copies + 1)
        names = list(DEGRADATIONS)
        return "none" if copy == 0 else names[(photo * self.copies + copy - 1) % len(names)]

    def read(self, index: int) -> Image.Image:
        """The image with its defect. Errors: UnreadableImageError."""
        image = self.source.read(int(self.originals[index]))
        if self.kinds[index] == "none":
            return image
        generator = np.random.default_rng((self.seed, index))
        return degrade(image, self.kinds[index], float(self.severities[index]), generator)


def london_faces(root: Path, split: str) -> FaceSource:
    """The Face Research Lab London Set: ``neutral_front``, ``smiling_front``, ``london_info.csv``.

    ``split``: train (people below 110), val (to 129), trainable (both), withheld (from 130), numbers as in "1-65", or
    folds of the trainable people: "fold_0+3_of_5" has every fifth of them from the first and from the fourth on.
    Only the neutral photographs come with landmarks; those of a smiling one are carried over from its neutral twin.
    """
    fold = FOLD.fullmatch(split)
    first, last = people_range("trainable" if fold else split)
    groups = read_groups(root / "london_info.csv")
    files = sorted([*root.glob("neutral_front/*_03.jpg"), *root.glob("smiling_front/*_08.jpg")])
    numbers = {file.stem[:3] for file in files if file.stem[:3].isdecimal()}
    wanted = sorted(number for number in numbers if first <= int(number) <= last)
    if fold:
        wanted = people_of_folds(wanted, fold[1], int(fold[2]), split)
    photos, people = [], []
    for file in files:
        person = file.stem[:3]
        if person not in wanted:
            continue
        neutral = root / "neutral_front" / f"{person}_03.jpg"
        photos.append(Photo(file, neutral, groups.get(person, {})))
        people.append(person)
    if not photos:
        raise DataError(f"{root} holds no photographs of people {first} to {last}; expected neutral_front/NNN_03.jpg")
    return FaceSource(photos, people)


def fold_split(places: Sequence[int], folds: int) -> str:
    """The name of the split that has the folds at ``places``, of so many."""
    return f"fold_{'+'.join(map(str, places))}_of_{folds}"


def people_of_folds(people: Sequence[str], places: str, folds: int, split: str) -> list[str]:
    """Those of ``people``, in order, that are dealt to the folds at ``places``. Errors: DataError."""
    wanted = {int(place) for place in places.split("+")}
    if folds < 2 or max(wanted) >= folds:
        raise DataError(f"the split {split!r} names folds {places} of {folds}; they count from 0, and two make folds")
    return [person for place, person in enumerate(people) if place % folds in wanted]


def orl_faces(root: Path, split: str) -> FaceSource:
    """ORL: ``s1`` to ``s40`` with ten grey pictures each. Its one split is "measure"; it must not train anything."""
    if split != "measure":
        raise DataError(
            f"ORL has no split {split!r}: its licence does not allow training what is passed on; measure with 'measure'"
        )
    files = sorted(root.glob("s*/*.pgm"), key=lambda file: (int(file.parent.name[1:]), int(file.stem)))
    if not files:
        raise DataError(f"{root} holds no pictures; expected s1/1.pgm to s40/10.pgm")
    return FaceSource([Photo(file) for file in files], [file.parent.name for file in files])


def people_range(split: str) -> tuple[int, int]:
    """First and last number of a split's people. Errors: DataError, also for a range that straddles the withheld."""
    if split in LONDON_SPLITS:
        return LONDON_SPLITS[split]
    found = re.fullmatch(r"(\d{1,3})-(\d{1,3})", split)
    if found is None:
        known = f"{', '.join(LONDON_SPLITS)}, numbers as in 1-65, nor folds as in fold_0+3_of_5"
        raise DataError(f"the split {split!r} is neither {known}")
    first, last = int(found[1]), int(found[2])
    if first < WITHHELD_FROM <= last:
        raise DataError(f"the split {split!r} mixes people with the withheld ones, who begin at {WITHHELD_FROM}")
    return first, last


def read_groups(file: Path) -> dict[str, dict[str, str]]:
    """Person to sex, ethnicity and age (under 25, 25 to 34, from 35), as the set's authors recorded them."""
    if not file.is_file():
        raise DataError(f"{file} does not exist; it says who is on the photographs")
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    return {
        row["face_id"].removesuffix(".0").zfill(3): {
            "sex": row["face_gender"],
            "ethnicity": row["face_eth"],
            "age": age_group(row["face_age"]),
        }
        for row in rows
    }


def age_group(age: str) -> str:
    """A band of ages; "unknown" where there is no number."""
    try:
        years = float(age)
    except ValueError:
        return "unknown"
    return "under 25" if years < 25 else "25 to 34" if years < 35 else "from 35"


def read_landmarks(file: Path) -> NDArray[np.float64]:
    """Five landmarks [5, 2] out of the set's 189. Errors: DataError."""
    if not file.is_file():
        raise DataError(f"{file} does not exist; the set's landmarks lie beside its neutral photographs")
    points = np.loadtxt(file, dtype=np.float64, ndmin=2)
    if points.shape != (189, 2):
        raise DataError(f"{file} holds landmarks of shape {points.shape}; expected (189, 2)")
    return np.stack([*points[list(PUPILS)], points[list(NOSE)].mean(axis=0), *points[list(MOUTH)]])


def carry_landmarks(known: Image.Image, landmarks: NDArray[np.float64], other: Image.Image) -> NDArray[np.float64]:
    """Landmarks [5, 2] of ``other``, a second photograph of the same session, from those of ``known``.

    Both eyes and the nose are found again by normalised correlation of the patches around them; the similarity that
    moves those three moves all five, since a smile moves the corners of the mouth.
    """
    scale = SEARCH_EYE_DISTANCE / inter_eye_distance(landmarks)
    first, second = (_small_grey(image, scale) for image in (known, other))
    moved = np.stack([_find_patch(first, second, point * scale) for point in landmarks[:3]]) / scale
    return fit_similarity(landmarks[:3], moved).apply(landmarks)


def _small_grey(image: Image.Image, scale: float) -> NDArray[np.float64]:
    size = round(image.width * scale), round(image.height * scale)
    return np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), dtype=np.float64)


def _find_patch(
    image: NDArray[np.float64], other: NDArray[np.float64], point: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Where in ``other`` the patch of ``image`` around ``point`` correlates best."""
    half, reach = round(PATCH_SHARE * SEARCH_EYE_DISTANCE), round(SEARCH_RANGE * SEARCH_EYE_DISTANCE)
    x, y = np.rint(point).astype(int)
    patch = image[y - half : y + half + 1, x - half : x + half + 1]
    top, left = max(y - half - reach, 0), max(x - half - reach, 0)
    area = other[top : y + half + reach + 1, left : x + half + reach + 1]
    windows = np.lib.stride_tricks.sliding_window_view(area, patch.shape)
    centred = patch - patch.mean()
    spread = windows.std(axis=(2, 3)) * patch.std() * patch.size
    correlation = np.einsum("abij,ij->ab", windows, centred) / np.maximum(spread, 1e-9)
    row, column = np.unravel_index(int(correlation.argmax()), correlation.shape)
    return point + np.array([left + column + half - x, top + row + half - y], dtype=np.float64)
