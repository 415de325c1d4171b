from pathlib import Path

import numpy as np
import pytest

from vision.data.classification import DataOptions
from vision.data.sources import DataError
from vision.data.textures import NUM_CLASSES, class_patterns, textures


def test_splits_are_made_from_the_seed_alone() -> None:
    options = DataOptions(kind="textures", root=".", image_size=32, resize=32)
    train, test = options.open_train(), options.open_eval()
    assert (len(train.labels), len(test.labels)) == (80 * NUM_CLASSES, 50 * NUM_CLASSES)
    assert train.class_names == test.class_names
    first, again = np.asarray(train.read(7)), np.asarray(options.open_train().read(7))
    assert first.shape == (32, 32, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, np.asarray(test.read(7)))


def test_classes_share_parts_and_differ() -> None:
    patterns = class_patterns().reshape(NUM_CLASSES, -1)
    alike = np.corrcoef(patterns) - np.eye(NUM_CLASSES)
    assert alike.max() > 0.5, "some classes look alike"
    assert alike.max() < 0.999, "no two are the same"
    assert patterns.mean(1) == pytest.approx(0, abs=1e-5)


def test_the_first_classes_are_those_of_the_whole() -> None:
    whole, few = (DataOptions(kind="textures", root=".", classes=classes) for classes in (None, 12))
    source, every = few.open_eval(), whole.open_eval()
    assert source.class_names == every.class_names[:12] == few.open_train().class_names
    assert np.bincount(source.labels).tolist() == [50] * 12
    assert np.array_equal(np.asarray(source.read(599)), np.asarray(every.read(599)))


@pytest.mark.parametrize("count", [1, 61])
def test_as_many_classes_as_there_are_not_are_refused(count: int) -> None:
    with pytest.raises(DataError, match=f"data.classes is {count}; .* allowed are 2 to 60"):
        DataOptions(kind="textures", root=".", classes=count).open_train()


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="no split 'val'; they have train, test"):
        textures(Path("."), "val")
