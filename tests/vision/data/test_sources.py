import gzip
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from vision.data.image_sources import open_source
from vision.data.sources import DataError, UnreadableImageError, read_image
from vision.images import decode_image


def write_image(
    path: Path, colour: object = (200, 10, 10), mode: str = "RGB", size: tuple[int, int] = (12, 10)
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def idx_bytes(array: np.ndarray, magic: int) -> bytes:
    header = b"".join(int(n).to_bytes(4, "big") for n in (magic, *array.shape))
    return header + array.astype(np.uint8).tobytes()


def write_idx(root: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    (root / f"{split}-images-idx3-ubyte").write_bytes(idx_bytes(images, 0x803))
    (root / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels, 0x801)))


def test_class_folders_are_sorted_and_searched_deeply(tmp_path: Path) -> None:
    for name in ("train/dog/b.JPEG", "train/dog/a.png", "train/cat/deep/c.jpg"):
        write_image(tmp_path / name)
    (tmp_path / "train/dog/notes.txt").write_text("not an image")
    (tmp_path / "train/.cache").mkdir()
    source = open_source("folder", tmp_path, "train")
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, 1]
    assert source.read(1).size == (12, 10)


@pytest.mark.parametrize(("mode", "colour"), [("L", 77), ("RGBA", (1, 2, 3, 0)), ("P", 3), ("1", 1), ("LA", (77, 128))])
def test_other_modes_become_rgb(tmp_path: Path, mode: str, colour: object) -> None:
    image = read_image(write_image(tmp_path / "x.png", colour, mode))
    assert image.mode == "RGB"
    if mode == "L":
        assert image.getpixel((0, 0)) == (77, 77, 77)
    if mode == "RGBA":
        assert image.getpixel((0, 0)) == (255, 255, 255), "what is transparent is laid on white"


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_photographs_are_read_upright_as_the_server_reads_them(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png", exif=exif)
    image = np.asarray(read_image(tmp_path / "x.png"))
    width, height = (6, 9) if orientation >= 5 else (9, 6)
    assert image.shape == (height, width, 3)
    np.testing.assert_array_equal(image, decode_image((tmp_path / "x.png").read_bytes()).image)
    np.testing.assert_array_equal(image, read_image(tmp_path / "x.png", (width, height)))
    assert np.array_equal(image, noise) == (orientation == 1)
    if orientation >= 5:
        np.testing.assert_array_equal(read_image(tmp_path / "x.png", (9, 6)), noise)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff\xd8\xff\xe0truncated"])
def test_corrupt_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"bad\.jpg is not a readable image"):
        read_image(tmp_path / "bad.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif"])
def test_truncated_files_are_named(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"x.{suffix}")
    whole = (tmp_path / f"x.{suffix}").read_bytes()
    (tmp_path / f"x.{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableImageError, match=rf"x\.{suffix} is not a readable image"):
        read_image(tmp_path / f"x.{suffix}")


def test_a_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60,000 x 60,000 pixels in a few bytes of PNG."""
    data = bytearray(write_image(tmp_path / "bomb.png", 1, "1").read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(data)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(UnreadableImageError, match=r"bomb\.png is not a readable image"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_of_an_animation_the_first_image_is_read(tmp_path: Path, suffix: str) -> None:
    first, second = Image.new("RGB", (12, 10), (250, 0, 0)), Image.new("RGB", (12, 10), (0, 0, 250))
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"x.{suffix}", save_all=True, append_images=[second], duration=50, **options)
    assert read_image(tmp_path / f"x.{suffix}").getpixel((5, 5)) == (250, 0, 0)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match=r"none\.jpg"):
        read_image(tmp_path / "none.jpg")


def test_empty_class_folders_are_named(tmp_path: Path) -> None:
    write_image(tmp_path / "train/cat/a.png")
    (tmp_path / "train/dog").mkdir()
    (tmp_path / "train/eel").mkdir()
    (tmp_path / "train/eel/._a.png").write_bytes(b"what macOS puts into archives")
    with pytest.raises(DataError, match=r"class folders without images in .*train: dog, eel"):
        open_source("folder", tmp_path, "train")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="val is not a folder"):
        open_source("folder", tmp_path, "val")
    write_image(tmp_path / "val/a.png")
    with pytest.raises(DataError, match=r"holds no class folders.*a flat folder of images has no labels"):
        open_source("folder", tmp_path, "val")
    with pytest.raises(DataError, match="kind 'pickle' is not known; allowed are folder, cifar10, cifar100, idx"):
        open_source("pickle", tmp_path, "train")


def test_idx_files_plain_and_packed(tmp_path: Path) -> None:
    images = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    write_idx(tmp_path, "train", images, np.array([7, 0, 9]))
    source = open_source("idx", tmp_path, "train")
    assert source.labels.tolist() == [7, 0, 9]
    assert len(source.class_names) == 10
    image = np.asarray(source.read(1))
    assert image.shape == (4, 5, 3)
    assert (image == images[1][:, :, None]).all()


def test_broken_idx_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte nor train-images-idx3-ubyte\.gz exists"):
        open_source("idx", tmp_path, "train")
    write_idx(tmp_path, "train", np.zeros((3, 4, 5)), np.array([1, 2]))
    with pytest.raises(DataError, match="3 images and 2 labels"):
        open_source("idx", tmp_path, "train")
    file = tmp_path / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"is truncated: its header says \(3, 4, 5\), it holds 59 bytes"):
        open_source("idx", tmp_path, "train")
    file.write_bytes(whole[:6])
    with pytest.raises(DataError, match="is truncated"):
        open_source("idx", tmp_path, "train")
    file.write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match="is not an idx file"):
        open_source("idx", tmp_path, "train")
    file.write_bytes(whole)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8bnot gzip")
    with pytest.raises(DataError, match="cannot read"):
        open_source("idx", tmp_path, "train")


def cifar_bytes(labels: list[tuple[int, ...]]) -> bytes:
    pixels = np.arange(3072, dtype=np.uint32).astype(np.uint8).tobytes()
    return b"".join(bytes(label) + pixels for label in labels)


def test_cifar10_binary(tmp_path: Path) -> None:
    (tmp_path / "batches.meta.txt").write_text("cat\ndog\n\n")
    for n in range(1, 6):
        (tmp_path / f"data_batch_{n}.bin").write_bytes(cifar_bytes([(n % 2,), (1,)]))
    (tmp_path / "test_batch.bin").write_bytes(cifar_bytes([(0,)]))
    source = open_source("cifar10", tmp_path, "train")
    assert source.labels.tolist() == [1, 1, 0, 1, 1, 1, 0, 1, 1, 1]
    image = np.asarray(source.read(0))
    assert image.shape == (32, 32, 3)
    assert image[0, 1].tolist() == [1, 1025 % 256, 2049 % 256], "channels are planes in the file"
    assert image[1, 0, 0] == 32
    assert len(open_source("cifar10", tmp_path, "test").labels) == 1


def test_cifar100_uses_fine_labels(tmp_path: Path) -> None:
    (tmp_path / "fine_label_names.txt").write_text("a\nb\nc\n")
    (tmp_path / "train.bin").write_bytes(cifar_bytes([(9, 2), (9, 0)]))
    assert open_source("cifar100", tmp_path, "train").labels.tolist() == [2, 0]


def test_broken_cifar_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "batches.meta.txt").write_text("cat\n")
    (tmp_path / "test_batch.bin").write_bytes(cifar_bytes([(0,)])[:-3])
    with pytest.raises(DataError, match=r"test_batch\.bin holds 3070 bytes, not a multiple of 3073"):
        open_source("cifar10", tmp_path, "test")
    (tmp_path / "test_batch.bin").write_bytes(cifar_bytes([(4,)]))
    with pytest.raises(DataError, match="label 4 is beyond the 1 classes"):
        open_source("cifar10", tmp_path, "test")


def archive(name: str) -> Path:
    root = os.environ.get("DOVETAIL_TEST_DATA")
    file = Path(root or "") / "classification" / name
    if root is None or not file.is_file():
        pytest.skip(f"DOVETAIL_TEST_DATA does not hold classification/{name}")
    return file


def test_mnist(tmp_path: Path) -> None:
    with tarfile.open(archive("mnist_idx.tar")) as tar:
        tar.extractall(tmp_path, filter="data")
    source = open_source("idx", tmp_path / "mnist", "t10k")
    assert np.bincount(source.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert source.read(0).size == (28, 28)
