"""Mining does what it claims where the hard examples are known: a linear classifier over planted features.

Each image has many regions: easy background far from the boundary, a few hard ones just across it, and a few objects.
Hard ones are a fiftieth of all, so a random or plain mean hardly feels them.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vision.mining import OHEM, AllRegions, Miner, RandomSample, StratifiedOHEM, loss_rank_mining

NUM_EASY, NUM_HARD, NUM_OBJECTS = 480, 10, 10


def scene(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [R, 2], labels [R], boxes [R, 4], and which regions are hard [R].

    Objects lie around (1, 1) and easy background around (-3, 0); hard background, around (1, -1), is told from objects
    by the second feature alone.
    """
    centres = torch.tensor([[-3.0, 0.0], [1.0, -1.0], [1.0, 1.0]])
    kinds = torch.repeat_interleave(torch.arange(3), torch.tensor([NUM_EASY, NUM_HARD, NUM_OBJECTS]))
    features = centres[kinds] + 0.3 * torch.randn(len(kinds), 2, generator=generator)
    corners = torch.arange(len(kinds))[:, None] * 20.0
    boxes = torch.cat([corners, corners, corners + 10, corners + 10], dim=1)
    return features, (kinds == 2).long(), boxes, kinds == 1


def losses_of(model: nn.Module, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and a localisation loss of foreground that does not depend on the model."""
    classification = functional.cross_entropy(model(features), labels, reduction="none")
    return classification, 0.05 * labels.float()


def train(miner: Miner, steps: int = 60) -> tuple[float, float]:
    """Share of hard ones among those that trained, over all steps, and the error on fresh hard background."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    shares = []
    for step in range(steps):
        features, labels, boxes, hard = scene(generator)
        classification, localization = losses_of(model, features, labels)
        chosen = miner(classification, localization, boxes, labels, step / steps)
        shares.append(hard[chosen].float().mean().item())
        optimizer.zero_grad()
        classification[chosen].mean().backward()
        optimizer.step()
    features, labels, _, hard = scene(generator)
    wrong = (model(features[hard]).argmax(dim=1) != labels[hard]).float().mean().item()
    return sum(shares) / steps, wrong


@pytest.mark.parametrize("miner", [OHEM(32), StratifiedOHEM(32)], ids=["ohem", "s-ohem"])
def test_mined_training_finds_the_hard_ones_and_learns_them(miner: Miner) -> None:
    all_share, all_wrong = train(AllRegions())
    random_share, _ = train(RandomSample(32, positive_share=1.0, generator=torch.Generator().manual_seed(0)))
    mined_share, mined_wrong = train(miner)
    assert all_share == pytest.approx(NUM_HARD / (NUM_EASY + NUM_HARD + NUM_OBJECTS))
    assert random_share < 0.05
    assert mined_share > 0.25, "ten hard ones of 500 should be most of what can fill 32 places"
    assert all_wrong > 0.5, "without mining the hard ones drown"
    assert mined_wrong <= 0.1


def test_loss_rank_mining_keeps_the_hard_elements_of_a_map() -> None:
    """Once easy background is learnt the K costliest elements are the hard ones and the objects."""
    generator = torch.Generator().manual_seed(1)
    features, labels, boxes, hard = scene(generator)
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        model.bias.zero_()
        loss = sum(losses_of(model, features, labels))
    assert isinstance(loss, Tensor)
    mask = loss_rank_mining(loss[None], boxes[None], k=NUM_HARD + NUM_OBJECTS)[0]
    assert mask[hard].all()
    assert (mask & ~hard & (labels == 0)).sum() == 0


def test_stratified_mining_moves_from_classification_to_localisation() -> None:
    """Regions of known strata: late in training more of the chosen are hard to localise, though equally costly."""
    generator = torch.Generator().manual_seed(0)
    count = 400
    total = torch.rand(count, generator=generator) + 1
    ratio = torch.arange(count) / count
    labels = torch.ones(count, dtype=torch.long)
    corners = torch.arange(count)[:, None] * 20.0
    boxes = torch.cat([corners, corners, corners + 10, corners + 10], dim=1)
    shares = []
    for progress in (0.0, 0.6, 0.9):
        chosen = StratifiedOHEM(100)(ratio * total, (1 - ratio) * total, boxes, labels, progress)
        shares.append((ratio[chosen] < 0.25).float().mean().item())
        lowest = total[chosen][ratio[chosen] < 0.25].min()
        others = torch.ones(count, dtype=torch.bool).index_fill(0, chosen, False) & (ratio < 0.25)
        assert lowest >= total[others].max(), "inside a stratum the costliest are taken"
    assert shares == pytest.approx([0.05, 0.12, 0.20], abs=0.011)
    plain = OHEM(100)(ratio * total, (1 - ratio) * total, boxes, labels, 0.9)
    assert (ratio[plain] < 0.25).float().mean() == pytest.approx(0.25, abs=0.08)
