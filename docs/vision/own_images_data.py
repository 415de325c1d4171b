"""300 photographs of six classes in VOC's layout, as a user's own set would be: what own_images_study.toml trains on.

    python docs/vision/own_images_data.py DATA_FOLDER my_images

``DATA_FOLDER`` holds ``bccd`` (Shenggan/BCCD_Dataset, MIT, its folder BCCD), ``raccoon`` (datitran/raccoon_dataset: the
photographs are of unknown owners, so that nothing of what trains on them may be shipped) and ``london_faces`` (Face
Research Lab London Set, CC BY 4.0). Taken are 60 images of BCCD's test split, that the bundled detector was not trained
on, 120 with raccoons, and of the faces 60 neutral and 60 smiling ones, 18 people in both (there are 102). The set has
landmarks of neutral faces alone, so that the boxes of both are the face detector's (extra ``faces``), one a picture.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

from server.own_models import face_detector
from vision.images import decode_image
from vision.serving.batch import answer_pictures
from vision.serving.load import load_model
from vision.serving.protocol import Model

SEED = 21
CELLS, RACCOONS, FACES = 60, 120, 60
ANNOTATION = """<annotation>
 <filename>{file}</filename>
 <size><width>{width}</width><height>{height}</height><depth>3</depth></size>
 <object>
  <name>{name}</name>
  <bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>
 </object>
</annotation>
"""


def copy(photograph: Path, annotation: Path, output: Path) -> None:
    """An image and its annotation as they are."""
    shutil.copy(photograph, output / "images")
    shutil.copy(annotation, output / "annotations")


def cells(data: Path, draw: random.Random, output: Path) -> None:
    """Red cells, white cells and platelets of BCCD's test split."""
    folder = data / "bccd"
    names = sorted((folder / "ImageSets" / "Main" / "test.txt").read_text(encoding="utf-8").split())
    for name in draw.sample(names, CELLS):
        copy(folder / "JPEGImages" / f"{name}.jpg", folder / "Annotations" / f"{name}.xml", output)


def raccoons(data: Path, draw: random.Random, output: Path) -> None:
    """Raccoons, with the boxes that came with them."""
    folder = data / "raccoon"
    names = sorted(path.stem for path in (folder / "annotations").glob("*.xml"))
    for name in draw.sample(names, RACCOONS):
        copy(folder / "images" / f"{name}.jpg", folder / "annotations" / f"{name}.xml", output)


def faces(data: Path, draw: random.Random, output: Path) -> None:
    """Neutral faces of the first people of a drawn order, smiling ones of the last."""
    folder = data / "london_faces"
    people = sorted(path.name.split("_")[0] for path in (folder / "neutral_front").glob("*.jpg"))
    draw.shuffle(people)
    model = load_model(face_detector())
    for person in people[:FACES]:
        face(model, folder / "neutral_front" / f"{person}_03.jpg", "neutral face", output)
    for person in people[-FACES:]:
        face(model, folder / "smiling_front" / f"{person}_08.jpg", "smiling face", output)


def face(model: Model, photograph: Path, name: str, output: Path) -> None:
    """A photograph with the one face that the detector finds on it."""
    picture = decode_image(photograph.read_bytes())
    (found,) = answer_pictures(model, [picture], {})[0]["faces"]
    corners = [str(round(edge)) for edge in found["box"]]
    filled = ANNOTATION.format(
        file=photograph.name, width=picture.width, height=picture.height, name=name,
        **dict(zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)),
    )  # fmt: skip
    shutil.copy(photograph, output / "images")
    (output / "annotations" / f"{photograph.stem}.xml").write_text(filled, encoding="utf-8")


def main(data: Path, output: Path) -> None:
    """Into ``output``, which must not exist yet."""
    for folder in ("images", "annotations"):
        (output / folder).mkdir(parents=True)
    draw = random.Random(SEED)
    for source in (cells, raccoons, faces):
        source(data, draw, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
