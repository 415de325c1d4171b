import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from server.cli import app
from vision.backbones import create_backbone, list_backbones
from vision.backbones.backbone import Backbone
from vision.backbones.checkpoint import (
    convert_author_weights,
    load_author_weights,
    load_backbone,
    load_state,
    save_backbone,
)
from vision.backbones.menet import MENet, MENetConfig
from vision.backbones.preprocessing import BGR_255, IMAGENET, Preprocessing
from vision.serving.folder import CheckpointError

FAMILIES = ["snet49", "shufflenet_v2_x0_5", "menet_108_8x1_g3", "fd_mobilenet_x0_25", "mobilenet_v1_x0_25"]


def author_shufflenet_keys(model: Backbone, *, snet: bool) -> list[str]:
    """Names of the authors' layout, written out from their tables, in the order of this project's state dict."""
    layers = (("conv", ["weight"]), ("bn", ["weight", "bias", "running_mean", "running_var"]))

    def sequence(prefix: str, places: str) -> list[str]:
        kinds = dict(layers)
        return [f"{prefix}.{i}.{n}" for i, kind in enumerate(places.split()) if kind in kinds for n in kinds[kind]]

    right, left = ("branch", "branch_left") if snet else ("branch_main", "branch_proj")
    keys = sequence("first_conv", "conv bn relu")
    number = 0
    for stage, units in enumerate((4, 8, 4)):
        for unit in range(units):
            prefix = f"stage.{stage}.{unit}" if snet else f"features.{number}"
            keys += sequence(f"{prefix}.{right}", "conv bn relu conv bn conv bn relu")
            keys += sequence(f"{prefix}.{left}", "conv bn conv bn relu") if unit == 0 else []
            number += 1
    keys += sequence("conv_last", "conv bn relu") if hasattr(model.final, "0") else []
    return [*keys, "classifier.0.weight"]


def author_menet_keys() -> list[str]:
    norm = ["weight", "bias", "running_mean", "running_var"]
    keys = ["features.init.conv.weight"] + [f"features.init.bn.{n}" for n in norm]
    for stage, units in enumerate((4, 8, 4), start=1):
        for unit in range(1, units + 1):
            for layer in ("compress", "s_merge", "s_conv", "s_evolve", "depthwise", "expand"):
                bn = f"s_bn_{layer[2:]}" if layer.startswith("s_") else f"bn_{layer}"
                keys.append(f"features.stage_{stage}_{unit}.{layer}.weight")
                keys += [f"features.stage_{stage}_{unit}.{bn}.{n}" for n in norm]
    return [*keys, "classifier.weight", "classifier.bias"]


def author_mobilenet_keys(blocks: int) -> list[str]:
    norm = ["weight", "bias", "running_mean", "running_var"]
    keys = ["features.conv_0.weight"] + [f"features.norm_0.{n}" for n in norm]
    for block in range(blocks):
        for kind in ("dw", "pw"):
            keys.append(f"features.{kind}_conv_{block}.weight")
            keys += [f"features.{kind}_norm_{block}.{n}" for n in norm]
    return [*keys, "classifier.weight", "classifier.bias"]


def author_keys(name: str, model: Backbone) -> list[str]:
    if name.startswith(("snet", "shufflenet")):
        return author_shufflenet_keys(model, snet=name.startswith("snet"))
    if name.startswith("menet"):
        return author_menet_keys()
    return author_mobilenet_keys(11 if name.startswith("fd") else 13)


def synthetic_checkpoint(name: str) -> tuple[Backbone, dict[str, Tensor]]:
    """A model with random state, and its tensors under the authors' names."""
    torch.manual_seed(1)
    model = create_backbone(name, 6).eval()
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + (0.5 if key.endswith("running_var") else -0.3))
    if name.startswith("shufflenet"):
        model.head.bias.data.zero_()
    own = [k for k in model.state_dict() if not k.endswith("num_batches_tracked")]
    if name.startswith("shufflenet"):
        own.remove("head.bias")
    keys = author_keys(name, model)
    assert len(keys) == len(own)
    return model, {theirs: model.state_dict()[ours].clone() for theirs, ours in zip(keys, own, strict=True)}


@pytest.mark.parametrize("name", FAMILIES)
def test_authors_checkpoints_load(name: str) -> None:
    source, state = synthetic_checkpoint(name)
    model = create_backbone(name, 6).eval()
    load_author_weights(model, {f"module.{key}": tensor for key, tensor in state.items()})
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)
    assert model.normalization == (BGR_255 if name.startswith(("snet", "shufflenet")) else IMAGENET)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_authors_file_becomes_a_folder_to_start_from(tmp_path: Path, suffix: str) -> None:
    source, state = synthetic_checkpoint("fd_mobilenet_x0_25")
    file = tmp_path / f"published.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, file)
    else:
        save_file(state, file)
    result = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "own"), "--backbone", "fd_mobilenet_x0_25"])
    assert json.loads(result.stdout)["num_classes"] == 6, result.output
    again, x = load_backbone(tmp_path / "own"), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), source(x))
    with pytest.raises(CheckpointError, match="not a checkpoint of snet49"):
        convert_author_weights(file, "snet49", tmp_path / "other")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": Path("/")}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="no file of tensors alone"):
        convert_author_weights(tmp_path / "bad.pth", "snet49", tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_authors_checkpoint_of_another_network_is_refused() -> None:
    _, state = synthetic_checkpoint("fd_mobilenet_x0_25")
    with pytest.raises(
        CheckpointError, match=r"not a checkpoint of snet49; keys 281 missing: .*; 117 unexpected: classifier\.bias"
    ):
        load_author_weights(create_backbone("snet49", 6), state)


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = create_backbone(name, 3).eval()
    model.class_names = ("cat", "dog", "kite")
    model.preprocessing = Preprocessing(image_size=64, resize=72, normalization=BGR_255)
    save_backbone(model, tmp_path / "model")
    again = load_backbone(tmp_path / "model")
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert (again.name, again.class_names, again.preprocessing) == (name, model.class_names, model.preprocessing)
    assert not again.training
    assert not list(tmp_path.rglob("*.bin"))


def test_custom_configuration_round_trips(tmp_path: Path) -> None:
    save_backbone(MENet(MENetConfig(72, None, 2, 8), 2), tmp_path)
    assert load_backbone(tmp_path).config == MENetConfig(72, None, 2, 8)


def test_state_of_another_network_names_the_keys() -> None:
    state = create_backbone("snet49", 6).state_dict()
    state["head.weight"] = torch.zeros(6, 100)
    state["extra"] = torch.zeros(1)
    del state["stem.0.weight"]
    message = (
        r"somewhere is not a checkpoint of snet49; keys 1 missing: stem\.0\.weight; 1 unexpected: extra; "
        r"1 of another shape: head\.weight \(6, 100\) instead of \(6, 512\)"
    )
    with pytest.raises(CheckpointError, match=message):
        load_state(create_backbone("snet49", 6), state, "somewhere")


def test_a_refused_state_changes_nothing() -> None:
    model = create_backbone("snet49", 6)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_state(model, create_backbone("snet146", 6).state_dict(), "somewhere")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_backbone(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_backbone(tmp_path)
    file.write_text("[]")
    with pytest.raises(CheckpointError, match="holds list, not an object"):
        load_backbone(tmp_path)
    file.write_text(json.dumps({"family": "resnet"}))
    with pytest.raises(CheckpointError, match=r"KeyError: 'resnet'.*families are .*menet.*snet"):
        load_backbone(tmp_path)
    save_backbone(create_backbone("snet49", 2), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_backbone(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        load_backbone(tmp_path)


def test_every_family_has_an_author_map() -> None:
    with torch.device("meta"):
        for name in list_backbones():
            model = create_backbone(name)
            if name.startswith("plain"):  # ours: there are no authors
                assert model.rename_author_key("layers.0.0.weight") == "layers.0.0.weight"
                continue
            own = {k for k in model.state_dict() if not k.endswith("num_batches_tracked")}
            assert {model.rename_author_key(key) for key in author_keys(name, model)} >= own - {"head.bias"}
