"""The recipe's tables and the guide to them: its example is one that the trainer reads, and no option is left out."""

import dataclasses
import re
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest

from drafters.train.feature_source import DataOptions
from drafters.train.options import DrafterRecipe, DrafterShape, LossOptions

GUIDE = (Path(__file__).resolve().parents[3] / "docs" / "training-drafters.md").read_text(encoding="utf-8")


def test_the_guides_recipe_is_read() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", GUIDE, flags=re.DOTALL)
    recipe = DrafterRecipe.read(tomllib.loads(textwrap.dedent(block)))
    config = recipe.config(vocab_size=32_000, hidden_size=4096, fingerprint="model:1")
    assert (config.head_dim, config.target) == (128, "model:1")
    assert f"| DGF | 0.27 B | {recipe.memory(config).total / 1e9:.1f} GB |" in GUIDE


@pytest.mark.parametrize("table", [DrafterShape, LossOptions, DataOptions])
def test_the_guide_names_every_option(table: Any) -> None:
    missing = [field.name for field in dataclasses.fields(table) if f"`{field.name}`" not in GUIDE]
    assert not missing
