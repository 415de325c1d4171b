"""Two small experiments whose orderings carry the claims of balance divergence, and their limits."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from vision.distillation import BalanceDivergenceLoss


def fit_low_rank_student(forward_weight, reverse_weight):
    """A rank-8 student of 128 x 50 teacher logits: capacity for the teacher's peaks or its tail, not for both."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(128, 50, generator=generator, dtype=torch.float64) * 1.5
    teacher[torch.arange(128), torch.randint(50, (128,), generator=generator)] += 7
    generator = torch.Generator().manual_seed(1)
    factors = [0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((128, 8), (8, 50))]
    for factor in factors:
        factor.requires_grad_()
    loss = BalanceDivergenceLoss(forward_weight, reverse_weight, 1.0, 1.0)
    optimizer = torch.optim.Adam(factors, lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss(factors[0] @ factors[1], teacher).backward()
        optimizer.step()
    p, q = teacher.softmax(-1), (factors[0] @ factors[1]).detach().softmax(-1)
    return {
        "teacher_peak": p.amax(-1).mean().item(),
        "peak": q.amax(-1).mean().item(),
        "agreement": (p.argmax(-1) == q.argmax(-1)).float().mean().item(),
        "excess_tail": ((q - p).clamp(min=0) * (p < 1e-3)).sum(-1).mean().item(),
    }


def test_reverse_term_empties_the_tail_and_forward_term_keeps_the_modes():
    forward, reverse, mixed = (fit_low_rank_student(*weights) for weights in ((1, 0), (0, 1), (0.5, 0.5)))
    assert forward["teacher_peak"] == pytest.approx(0.8229, abs=1e-3)
    assert forward["excess_tail"] > mixed["excess_tail"] > reverse["excess_tail"]
    assert mixed["agreement"] >= forward["agreement"] > reverse["agreement"]
    assert forward["peak"] < mixed["peak"] < reverse["peak"]


NUM_CLASSES = 60
SIDE = 24


def texture_batch(bases, per_class, generator):
    """Images [N, 1, 24, 24] of every class: the class's texture, shifted by up to 4 pixels, under noise of sd 1.1."""
    images = []
    for base in bases.repeat_interleave(per_class, 0):
        shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
        images.append(base.roll(shift, dims=(0, 1)))
    stacked = torch.stack(images).unsqueeze(1)
    noise = 1.1 * torch.randn(stacked.shape, generator=generator)
    return stacked + noise, torch.arange(NUM_CLASSES).repeat_interleave(per_class)


@pytest.fixture(scope="module")
def textures():
    """Classes share 20 low-frequency parts, so that a teacher's small probabilities say which classes are alike."""
    generator = torch.Generator().manual_seed(0)
    parts = functional.interpolate(torch.randn(20, 1, 6, 6, generator=generator), SIDE, mode="bicubic")[:, 0]
    mixing = torch.randn(NUM_CLASSES, 20, generator=generator)
    bases = torch.einsum("cp,phw->chw", mixing, parts)
    bases = 1.8 * (bases - bases.mean((1, 2), keepdim=True)) / bases.std((1, 2), keepdim=True)
    return texture_batch(bases, 80, generator), texture_batch(bases, 50, generator)


def convolutional_net(width, seed):
    torch.manual_seed(seed)
    channels = [1, width, 2 * width, 4 * width]
    blocks = [
        nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o in pairwise(channels)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, NUM_CLASSES))


def train(net, images, labels, teacher_logits, distillation, rate, epochs=10, batch=64):
    """SGD with a one-cycle rate; 0.1 cross-entropy plus ``distillation``, or cross-entropy alone where it is None."""
    steps = len(images) // batch
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    generator = torch.Generator().manual_seed(7)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: steps * batch].split(batch):
            logits = net(images[rows])
            loss = functional.cross_entropy(logits, labels[rows])
            if distillation is not None:
                loss = 0.1 * loss + distillation(logits, teacher_logits[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def accuracy(net, images, labels):
    with torch.no_grad():
        return (net(images).argmax(1) == labels).float().mean().item()


@pytest.mark.slow
def test_low_temperature_reverse_term_helps_and_tuned_kd_does_as_well(textures):
    """A minute. At equal weight the reverse term pays at temperature 1, hurts at 4, and a tuned KD does as well."""
    (images, labels), test_set = textures
    teacher = train(convolutional_net(32, seed=0), images, labels, None, None, rate=0.05)
    assert accuracy(teacher, *test_set) > 0.98
    with torch.no_grad():
        teacher_logits = teacher(images)

    def student_accuracy(loss):
        students = [convolutional_net(6, seed) for seed in range(2)]
        trained = [train(s, images, labels, teacher_logits, loss, rate=0.1) for s in students]
        return sum(accuracy(s, *test_set) for s in trained) / len(trained)

    kd = student_accuracy(BalanceDivergenceLoss(0.9, 0.0, 4.0, 1.0))
    tuned_kd = student_accuracy(BalanceDivergenceLoss(0.9, 0.0, 2.0, 1.0))
    balanced = student_accuracy(BalanceDivergenceLoss(0.45, 0.45, 4.0, 1.0))
    balanced_hot = student_accuracy(BalanceDivergenceLoss(0.45, 0.45, 4.0, 4.0))
    assert tuned_kd > balanced > kd > balanced_hot
