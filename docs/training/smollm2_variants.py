"""The default model's drafter with other choices, where they need no training: draft vocabulary and confidence.

    python docs/training/smollm2_variants.py DRAFTER OUTPUT

DRAFTER is what ``dovetail train drafter drafters/recipes/smollm2_drafter.toml`` left. Its head is the target's, so it
can draft any number of tokens: the most frequent ones of its training data, or all. Without its confidence a tree grows
by the drafts' own probabilities. OUTPUT gets a drafter folder for each choice.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from drafters.checkpoint import read_network, save_drafter
from drafters.network import DovetailConfig, DovetailNetwork
from drafters.train.capture import MANIFEST_FILE, CapturedSamples, Manifest
from drafters.train.draft_vocabulary import frequent_tokens
from kernels.training import load_recipe

RECIPE = Path("drafters/recipes/smollm2_drafter.toml")
SIZES = (2048, 4096, None)


def variant(trained: DovetailNetwork, **changes: object) -> DovetailNetwork:
    """The same weights under a changed configuration; what it has no place for is left out."""
    assert isinstance(trained.config, DovetailConfig)
    network = DovetailNetwork(dataclasses.replace(trained.config, **changes))  # type: ignore[arg-type]
    wanted = network.state_dict()
    state = {name: tensor for name, tensor in trained.state_dict().items() if name in wanted}
    if network.draft_ids is not None:
        state["draft_ids"] = state["draft_ids"][: len(network.draft_ids)]  # of the right length, to be filled in
    network.load_state_dict(state)
    return network


def main(drafter: Path, output: Path) -> None:
    """Write the variants."""
    trained = read_network(drafter, torch.device("cpu"), torch.float32)
    assert isinstance(trained, DovetailNetwork)
    folder = Path(load_recipe(RECIPE)["data"]["captured"]) / "train"
    samples = CapturedSamples(folder, Manifest(**json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))))
    save_drafter(variant(trained, confidence=False), output / "no_confidence")
    for size in SIZES:
        for confidence, ending in ((True, ""), (False, "_no_confidence")):
            network = variant(trained, draft_vocab_size=size, confidence=confidence)
            if network.draft_ids is not None:
                network.draft_ids.copy_(frequent_tokens(samples, trained.config.vocab_size, len(network.draft_ids)))
            save_drafter(network, output / f"vocabulary_{size or 'all'}{ending}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
