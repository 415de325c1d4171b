"""The method without any face: labels from a recogniser, the tiny network learns them, errors fall as images go."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from vision.face_quality import TinyFQNet, balancing_weights, quality_labels
from vision.face_quality.evaluate import error_versus_discard, pair_quality, partial_auc, spearman, threshold_at_fmr

SIDE = 48


def with_defect(image, severity, kind, generator):
    """One defect of a severity from 0 to 1: fewer pixels, noise, or an occluding square."""
    if kind == 0:
        small = max(2, round(SIDE * (1 - 0.95 * severity)))
        reduced = functional.interpolate(image[None], small, mode="bilinear", antialias=True)
        return functional.interpolate(reduced, SIDE, mode="bilinear")[0]
    if kind == 1:
        return image + 2 * severity * torch.randn(image.shape, generator=generator)
    side = round(0.95 * severity * SIDE)
    x, y = torch.randint(0, SIDE - side + 1, (2,), generator=generator).tolist()
    occluded = image.clone()
    occluded[:, y : y + side, x : x + side] = 0
    return occluded


def stand_in_faces(identities, images, seed):
    """Images [N, 3, 48, 48], identities [N] and severities [N]: a colour pattern an identity, a defect an image."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(identities, 3, 8, 8, generator=generator)
    patterns = functional.interpolate(patterns, SIDE, mode="bicubic").tanh()
    severities = torch.rand(identities * images, generator=generator)
    faces = []
    for index, severity in enumerate(severities.tolist()):
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        gain = 0.8 + 0.4 * float(torch.rand(1, generator=generator))
        kind = int(torch.randint(3, (1,), generator=generator))
        face = gain * patterns[index // images].roll(shift, dims=(1, 2))
        faces.append(with_defect(face, severity, kind, generator))
    return torch.stack(faces), torch.arange(identities).repeat_interleave(images), severities


class Recogniser(nn.Module):
    def __init__(self, identities):
        super().__init__()
        layers, channels = [], 3
        for width in (24, 48, 96, 128):
            layers += [nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        # No pooling: who a pattern is lies in where its colours are, and pooling forgets that. It made labels that
        # predicted errors hardly better than the severity (pAUC 0.727 instead of 0.477).
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (SIDE // 16) ** 2, 64))
        self.centres = nn.Parameter(torch.randn(identities, 64))

    def forward(self, images):
        return functional.normalize(self.trunk(images))

    def loss(self, images, labels):
        return functional.cross_entropy(16 * self(images) @ functional.normalize(self.centres).T, labels)


def train_recogniser(images, identities):
    torch.manual_seed(0)
    model = Recogniser(int(identities.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(8):
        for rows in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            model.loss(images[rows], identities[rows]).backward()
            optimizer.step()
    return model.eval()


def train_scorer(images, labels):
    torch.manual_seed(0)
    model, weights = TinyFQNet(), balancing_weights(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    steps = len(images) // 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=12 * steps)
    for _ in range(12 * steps):
        rows = torch.multinomial(weights, 128, replacement=True)
        optimizer.zero_grad()
        functional.smooth_l1_loss(model(images[rows]), labels[rows], beta=0.1).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def predictions(model, images):
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(256)])


def area(features, identities, quality):
    """pAUC(0.3) of all mated pairs at an FMR of 1e-2, 1 for a useless score."""
    similarity = (features @ features.T).numpy()
    first, second = np.triu_indices(len(features), k=1)
    mated = (identities[first] == identities[second]).numpy()
    threshold = threshold_at_fmr(similarity[first[~mated], second[~mated]], 1e-2)
    first, second = first[mated], second[mated]
    pairs = pair_quality(quality.numpy()[first], quality.numpy()[second])
    curve = error_versus_discard(similarity[first, second], pairs, threshold, np.linspace(0, 0.3, 31))
    return partial_auc(curve, 0.3)


@pytest.mark.slow
def test_a_tiny_network_learns_quality_labels_of_unseen_identities():
    """About three minutes of one core."""
    images, identities, _ = stand_in_faces(240, 30, seed=0)
    other_images, other_identities, severities = stand_in_faces(120, 20, seed=1)
    recogniser = train_recogniser(images, identities)
    scorer = train_scorer(images, quality_labels(predictions(recogniser, images), identities).labels)

    features = predictions(recogniser, other_images)
    labels = quality_labels(features, other_identities).labels
    scores = predictions(scorer, other_images)
    by_label, by_score, by_severity, by_chance = (
        area(features, other_identities, quality) for quality in (labels, scores, -severities, torch.rand(len(labels)))
    )
    # Measured: 0.444, 0.608, 0.673, 0.978 and a correlation of 0.697; from other initial weights of the recogniser
    # 0.477, 0.620, 0.695 and 0.704.
    assert by_label < by_score < by_severity < by_chance
    assert by_score <= 0.70
    assert spearman(scores, labels) >= 0.65
