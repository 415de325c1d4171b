import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vision.backbones.preprocessing import BGR_255, Preprocessing
from vision.data.augmentation import AugmentationOptions
from vision.data.classification import ClassificationData, DataOptions, Sample, Skipped, collate, spread
from vision.data.sources import ArraySource, DataError, FolderSource, UnreadableImageError

PREPROCESSING = Preprocessing(16, 16)


def source(count: int = 8) -> ArraySource:
    images = np.random.default_rng(0).integers(0, 255, (count, 20, 20, 3), dtype=np.uint8)
    return ArraySource(images, np.arange(count, dtype=np.int64) % 2, ("a", "b"))


def folder(tmp_path: Path) -> FolderSource:
    (tmp_path / "a").mkdir(parents=True, exist_ok=True)
    for n in range(3):
        Image.new("L", (20, 20), 50 * n).save(tmp_path / "a" / f"{n}.png")
    (tmp_path / "a" / "1.png").write_bytes(b"broken")
    return FolderSource(tmp_path)


def test_samples_are_bytes_of_the_right_size() -> None:
    sample = ClassificationData(source(), Preprocessing(16, 20))[3]
    assert isinstance(sample, Sample)
    assert (sample.image.dtype, sample.image.shape, sample.label) == (torch.uint8, (3, 16, 16), 1)
    expected = torch.from_numpy(source().images[3][2:18, 2:18]).permute(2, 0, 1)
    assert torch.equal(sample.image, expected)


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    def view(seed: int, epoch: int, index: int) -> torch.Tensor:
        data = ClassificationData(source(), PREPROCESSING, AugmentationOptions(), seed)
        data.set_epoch(epoch)
        _ = data[(index + 1) % 8]
        sample = data[index]
        assert isinstance(sample, Sample)
        return sample.image

    assert torch.equal(view(0, 1, 2), view(0, 1, 2))
    assert not torch.equal(view(0, 1, 2), view(0, 2, 2))
    assert not torch.equal(view(0, 1, 2), view(1, 1, 2))


def test_unreadable_images_are_named_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ClassificationData(folder(tmp_path), PREPROCESSING)
    assert isinstance(data[1], Skipped)
    with caplog.at_level(logging.WARNING):
        batch = collate([data[n] for n in range(3)])
    assert batch["images"].shape == (2, 3, 16, 16)
    assert batch["labels"].tolist() == [0, 0]
    assert batch["skipped"].tolist() == [1]
    assert "1.png is not a readable image" in caplog.text
    assert batch["images"][1, :, 0, 0].tolist() == [100, 100, 100], "a grey image has three equal channels"


def test_a_batch_of_nothing_readable_is_an_error(tmp_path: Path) -> None:
    data = ClassificationData(folder(tmp_path), PREPROCESSING)
    with pytest.raises(UnreadableImageError, match=r"no image of a batch of 2 can be read; the first: .*1\.png"):
        collate([data[1], data[1]])


def test_limit_spreads_over_the_data() -> None:
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, None).tolist() == spread(3, 5).tolist() == [0, 1, 2]
    assert len(ClassificationData(source(), PREPROCESSING, limit=3)) == 3
    with pytest.raises(DataError, match=r"data\.limit is 0"):
        spread(3, 0)


def test_options() -> None:
    options = DataOptions("folder", "x", normalization="bgr_255")
    assert options.preprocessing == Preprocessing(224, 256, BGR_255)
    with pytest.raises(DataError, match=r"data\.kind is 'zip'; allowed are folder"):
        DataOptions("zip", "x")
    with pytest.raises(DataError, match=r"data\.normalization is 'none'; allowed are imagenet, bgr_255"):
        DataOptions("folder", "x", normalization="none")


def test_splits_default_to_the_kinds_own(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / split / split).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / split / split / "x.png")
    options = DataOptions("folder", str(tmp_path))
    assert (options.open_train().class_names, options.open_eval().class_names) == (("train",), ("val",))
    assert DataOptions("folder", str(tmp_path), eval_split="test").open_eval().class_names == ("test",)


def test_images_in_memory_are_decoded_once_and_give_the_same_views(tmp_path: Path) -> None:
    folder(tmp_path / "train" / "x")
    split = tmp_path / "train"
    disk = DataOptions("folder", str(tmp_path)).open_train()
    kept = DataOptions("folder", str(tmp_path), in_memory=True).open_train()
    augmentation = AugmentationOptions(color_jitter=0.2)
    first = [ClassificationData(kept, PREPROCESSING, augmentation)[n] for n in (0, 1, 2)]
    expected = [ClassificationData(disk, PREPROCESSING, augmentation)[n] for n in (0, 1, 2)]
    for file in split.rglob("*.png"):
        file.unlink()
    again = [ClassificationData(kept, PREPROCESSING, augmentation)[n] for n in (0, 1, 2)]
    for views in (first, again):
        assert isinstance(views[1], Skipped), "what cannot be read is tried again"
        for view, other in ((views[0], expected[0]), (views[2], expected[2])):
            assert isinstance(view, Sample)
            assert isinstance(other, Sample)
            assert torch.equal(view.image, other.image)
