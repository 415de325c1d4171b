"""Class-uniform and superclass-uniform batches."""

import pytest
import torch

from vision.distillation import ClassUniformSampler, SamplerError, SuperclassUniformSampler, find_superclasses

LABELS = torch.arange(100).repeat_interleave(10)


def same_class_pairs(labels):
    equal = labels.unsqueeze(0) == labels.unsqueeze(1)
    return int(equal.triu(diagonal=1).sum())


@pytest.mark.parametrize(
    ("batch_size", "images_per_class", "pairs"), [(64, 4, 96), (40, 2, 20), (40, 4, 60), (40, 8, 140)]
)
def test_every_batch_holds_k_images_of_each_class(batch_size, images_per_class, pairs):
    sampler = ClassUniformSampler(LABELS, batch_size, images_per_class)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 1000 // batch_size
    for batch in batches:
        assert len(set(batch)) == batch_size
        counts = torch.bincount(LABELS[batch], minlength=100)
        assert set(counts.tolist()) == {0, images_per_class}
        assert same_class_pairs(LABELS[batch]) == pairs


def test_epochs_differ_and_repeat():
    sampler = ClassUniformSampler(LABELS, 40, 4, seed=3)
    first = list(sampler)
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)
    assert list(sampler) != list(ClassUniformSampler(LABELS, 40, 4, seed=3))
    assert first != list(ClassUniformSampler(LABELS, 40, 4, seed=9))


def test_small_classes_are_repeated_and_large_ones_are_not():
    labels = [0] * 2 + [1] * 50
    for batch in ClassUniformSampler(labels, 8, 4):
        small, large = [i for i in batch if i < 2], [i for i in batch if i >= 2]
        assert len(small) == len(large) == len(set(large)) == 4


def test_labels_need_not_be_consecutive():
    labels = torch.tensor([7, 7, -3, -3])
    assert sorted(next(iter(ClassUniformSampler(labels, 4, 2)))) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("labels", "batch_size", "images_per_class", "message"),
    [
        (LABELS, 62, 4, "multiple"),
        (LABELS, 0, 4, "multiple"),
        ([0, 0, 1, 1], 8, 2, "different classes"),
        ([0, 0, 1], 4, 2, r"one image.*\[1\]"),
        ([0, 0, 1, 1, 2, 2], 9, 3, "fill one batch"),
        ([], 4, 2, "different classes"),
    ],
)
def test_impossible_batches_are_refused(labels, batch_size, images_per_class, message):
    with pytest.raises(SamplerError, match=message):
        ClassUniformSampler(labels, batch_size, images_per_class)


def blobs(count=12, size=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, 8, generator=generator) * 10
    return centres.repeat_interleave(size, 0) + torch.randn(count * size, 8, generator=generator) * 0.1


def test_superclasses_find_separate_blobs():
    found = find_superclasses(blobs(), 12).view(12, 20)
    assert (found == found[:, :1]).all()
    assert len(found[:, 0].unique()) == 12
    assert torch.equal(found.flatten(), find_superclasses(blobs(), 12))


def test_superclass_batches_hold_k_images_of_each_cluster():
    sampler = SuperclassUniformSampler(blobs(), 12, batch_size=32, images_per_class=4)
    for batch in sampler:
        counts = torch.bincount(sampler.superclasses[batch], minlength=12)
        assert set(counts.tolist()) == {0, 4}


def test_an_outlier_joins_the_nearest_cluster():
    features = torch.cat([blobs(count=3), torch.full((1, 8), 1000.0)])
    found = find_superclasses(features, 4)
    assert torch.bincount(found)[torch.bincount(found) > 0].min() >= 2


def test_identical_features_do_not_break_the_start():
    assert find_superclasses(torch.ones(10, 3), 4).unique().tolist() == [0]


@pytest.mark.parametrize(
    ("features", "count", "said"),
    [
        (torch.ones(10, 3), 6, "6 superclasses of 10 images"),
        (torch.ones(10, 3), 0, "0 superclasses of 10 images"),
        (torch.ones(10), 2, r"features are \(10,\)"),
        (torch.full((10, 3), torch.nan), 2, "finite"),
    ],
)
def test_impossible_superclasses_are_refused(features, count, said):
    with pytest.raises(SamplerError, match=said):
        find_superclasses(features, count)
