"""Batches that hold pairs of one class (Peng et al., arXiv 1904.01802, section 3.4).

A uniformly random batch of 64 from 100 classes holds 1 % same-class pairs; correlation has little to teach there. CUR
draws batch / k classes and k images of each (the paper's best k is 4; 8 and more collapse at batch 40). SUR does the
same on pseudo-classes found by k-means over the teacher's features, which tolerates imbalanced labels.

CUR changes the share of the classes an epoch sees wherever the labels are imbalanced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler


class SamplerError(ValueError):
    """Labels, batch size and images per class cannot make the batches asked for."""


class ClassUniformSampler(Sampler[list[int]]):
    """Batches of ``batch_size`` indices: batch_size / images_per_class classes, images_per_class images of each.

    Classes are drawn without replacement inside a batch; so are the images inside a class, unless the class has fewer
    than ``images_per_class``. An epoch has floor(len(labels) / batch_size) batches and depends on (seed, epoch) alone;
    call ``set_epoch`` before each. A ``batch_sampler`` of ``torch.utils.data.DataLoader``, whose batches several
    processes share out among themselves.

    Raises ``SamplerError``, also for a class with one image: it can make no pair.
    """

    def __init__(
        self,
        labels: Sequence[int] | Tensor,
        batch_size: int,
        images_per_class: int,
        seed: int = 0,
    ) -> None:
        if batch_size < 1 or images_per_class < 1 or batch_size % images_per_class:
            raise SamplerError(
                f"batch_size {batch_size} and images_per_class {images_per_class}; the batch must be a multiple"
            )
        self.batch_size = batch_size
        self.drop_last = True
        self.images_per_class = images_per_class
        self.seed = seed
        self.epoch = 0
        self._num_images = len(labels)
        by_class: dict[int, list[int]] = {}
        for index, label in enumerate(torch.as_tensor(labels).tolist()):
            by_class.setdefault(label, []).append(index)
        self._images = [torch.tensor(by_class[label]) for label in sorted(by_class)]
        self._check_classes([label for label in sorted(by_class) if len(by_class[label]) == 1])

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_images // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        per_batch = self.batch_size // self.images_per_class
        for _ in range(len(self)):
            order = torch.randperm(len(self._images), generator=generator)[:per_batch].tolist()
            yield [index for c in order for index in self._draw_images(self._images[c], generator)]

    def _draw_images(self, images: Tensor, generator: torch.Generator) -> list[int]:
        if len(images) < self.images_per_class:
            chosen = torch.randint(len(images), (self.images_per_class,), generator=generator)
        else:
            chosen = torch.randperm(len(images), generator=generator)[: self.images_per_class]
        drawn: list[int] = images[chosen].tolist()
        return drawn

    def _check_classes(self, lonely: list[int]) -> None:
        wanted = self.batch_size // self.images_per_class
        if len(self._images) < wanted:
            raise SamplerError(
                f"a batch wants {wanted} different classes ({self.batch_size} / {self.images_per_class}), and the "
                f"labels have {len(self._images)}; take a smaller batch or more images per class"
            )
        if lonely and self.images_per_class > 1:
            raise SamplerError(
                f"{len(lonely)} classes have one image and make no pair, the first being {lonely[:5]}; drop them, "
                "or use superclasses"
            )
        if len(self) == 0:
            raise SamplerError(f"{self._num_images} images do not fill one batch of {self.batch_size}")


class SuperclassUniformSampler(ClassUniformSampler):
    """``ClassUniformSampler`` over pseudo-classes: k-means clusters of the frozen teacher's features [N, D].

    The paper takes 1000 clusters on the 32,621 images of MSMT17. The clusters are found once, from (features, seed).
    """

    def __init__(
        self,
        teacher_features: Tensor,
        num_superclasses: int,
        batch_size: int,
        images_per_class: int,
        seed: int = 0,
    ) -> None:
        self.superclasses = find_superclasses(teacher_features, num_superclasses, seed)
        super().__init__(self.superclasses, batch_size, images_per_class, seed)


def find_superclasses(features: Tensor, num_superclasses: int, seed: int = 0, rounds: int = 50) -> Tensor:
    """k-means (k-means++ start, Lloyd's rounds) over features [N, D]: pseudo-labels [N], none with a single image.

    The paper does not describe its k-means; ours stops when no label changes or after ``rounds``, and dissolves
    clusters that end with one image into the nearest larger one, so that fewer than ``num_superclasses`` may remain.
    """
    if features.ndim != 2 or not torch.isfinite(features).all():
        raise SamplerError(f"teacher features are {tuple(features.shape)}; they must be [N, D] and finite")
    if not 1 <= num_superclasses <= len(features) // 2:
        raise SamplerError(
            f"{num_superclasses} superclasses of {len(features)} images; from 1 to {len(features) // 2} are possible, "
            "since each needs two images"
        )
    features = features.detach().float()
    centres = _spread_centres(features, num_superclasses, torch.Generator().manual_seed(seed))
    labels = torch.cdist(features, centres).argmin(dim=1)
    for _ in range(rounds):
        centres = _cluster_means(features, labels, centres)
        moved = torch.cdist(features, centres).argmin(dim=1)
        if torch.equal(moved, labels):
            break
        labels = moved
    populous = torch.bincount(labels, minlength=num_superclasses) >= 2
    return torch.cdist(features, centres).masked_fill(~populous, torch.inf).argmin(dim=1)


def _spread_centres(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is drawn in proportion to the squared distance to the nearest one so far."""
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    nearest = torch.full((len(features),), torch.inf)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).square().sum(dim=1).cpu())
        # Fewer distinct features than centres leave nothing to be far from: any image is as good as another.
        odds = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
    return features[chosen]


def _cluster_means(features: Tensor, labels: Tensor, previous: Tensor) -> Tensor:
    counts = torch.bincount(labels, minlength=len(previous)).unsqueeze(1)
    sums = torch.zeros_like(previous).index_add_(0, labels, features)
    return torch.where(counts > 0, sums / counts.clamp(min=1), previous)
