"""A scorer's life after training: measured, exported in both precisions, recognised by the server."""

import dataclasses
import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from drawn_faces import write_colour_recogniser, write_london

from vision.backbones import create_backbone
from vision.backbones.checkpoint import save_backbone
from vision.backbones.preprocessing import Preprocessing
from vision.data.faces import DegradedFaces, london_faces
from vision.face_quality import TinyFQNet, traced
from vision.face_quality.checkpoint import ScorerConfig, load_scorer, save_scorer
from vision.face_quality.evaluate import spearman
from vision.face_quality.labelling import LabelOptions, label_faces, label_readable
from vision.face_quality.recognition import RecogniserError, RecogniserOptions, load_recogniser
from vision.face_quality.report import EvaluationOptions, evaluate_face_quality
from vision.face_quality.tables import markdown, method_table
from vision.face_quality.traced import calibration_faces
from vision.images import Picture
from vision.serving.batch import answer_pictures
from vision.serving.export import NEEDED, ExportError, export_model
from vision.serving.folder import CheckpointError, name_of
from vision.serving.kinds.face_quality import KIND
from vision.serving.load import load_model
from vision.serving.networks import TorchNetwork

MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed (extra vision): {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    write_london(folder / "london", ("001", "130", "131", "132", "133"))
    write_colour_recogniser(folder / "colours.onnx")
    torch.manual_seed(0)
    model = TinyFQNet()
    with torch.no_grad():  # statistics of faces, and scores that differ
        model.train()
        for _ in range(20):
            model.features(torch.randn(4, 3, 112, 112))
        torch.nn.init.normal_(model.head.weight, 0.0, 2.0)
    save_scorer(
        model.eval(), ScorerConfig(licence="MIT", labels={"recogniser_sha256": "of another"}), folder / "scorer"
    )
    return folder


def test_a_scorer_comes_back_as_it_was_saved(material, tmp_path):
    model, config = load_scorer(material / "scorer")
    save_scorer(model, config, tmp_path / "again")
    again, same = load_scorer(tmp_path / "again")
    assert same == config and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    (tmp_path / "again" / "config.json").write_text(json.dumps({"format": "dovetail-face-quality", "scale": {}}))
    with pytest.raises(CheckpointError, match="describes no scorer"):
        load_scorer(tmp_path / "again")
    (tmp_path / "again" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not describe a quality scorer"):
        load_scorer(tmp_path / "again")


def test_the_report_holds_every_figure(material, tmp_path):
    options = EvaluationOptions("london_faces", material / "london", "withheld", copies=4, fmr=0.05)
    recogniser = RecogniserOptions(str(material / "colours.onnx"))
    report = evaluate_face_quality(material / "scorer", recogniser, options, tmp_path)
    assert (report.images, report.people, report.mated) == (40, 4, 100)
    assert set(report.methods) == {
        "tinyfqnet", "laplacian sharpness", "brightness", "naturalness", "embedding norm", "random", "true severity",
        "label",
    }  # fmt: skip
    assert report.methods["label"].spearman == pytest.approx(1.0)
    assert report.methods["true severity"].spearman_severity == pytest.approx(1.0)
    assert report.pauc == report.methods["tinyfqnet"].pauc and report.same_recogniser is False
    assert set(report.groups) == {"sex", "ethnicity", "age"} and set(report.groups["sex"]["0.2"]) == {"female", "male"}
    assert set(report.ordered["tinyfqnet"]) == {"blur", "downsampling", "jpeg", "occlusion", "darkness", "all"}
    assert report.ordered["laplacian sharpness"]["blur"] == 1.0 and report.ordered["brightness"]["darkness"] == 1.0
    assert set(report.drift) == {"flip", "gamma 0.5", "gamma 0.75", "gamma 1.5", "gamma 2"}
    assert "uniform" in report.templates and "tinyfqnet" in report.templates
    kept = json.loads((tmp_path / "report.json").read_text())
    assert {"pauc", "fnmr0", "spearman", "methods"} <= kept.keys()
    assert method_table(report).count("\n") == 9 and "| sex | female | 20 | " in markdown(report)
    if find_spec("matplotlib") is not None:
        assert (tmp_path / "error_versus_discard.png").stat().st_size > 5_000
        assert (tmp_path / "defects.png").stat().st_size > 5_000


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_export_answers_as_torch_does(material, tmp_path):
    model, config = load_scorer(material / "scorer")
    save_scorer(model, config, tmp_path / "served")
    report = export_model(tmp_path / "served")
    assert report["max_difference"] <= 1e-4 and (report["precision"], report["spearman"]) == ("fp32", None)
    served = load_model(tmp_path / "served")
    plain = dataclasses.replace(served, network=TorchNetwork(KIND.module(tmp_path / "served"), 1))
    assert (served.info.runtime, served.card.scale) == ("onnxruntime", config.scale)
    source = london_faces(material / "london", "withheld")
    crops = [source.read(index) for index in range(4)]
    pictures = [Picture(crop, 112, 112) for crop in crops]
    answers = [answer_pictures(model, pictures, {"aligned": True}) for model in (served, plain)]
    raw = [[answer["faces"][0]["raw"] for answer in one] for one in answers]
    np.testing.assert_allclose(raw[0], raw[1], atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_export_in_8_bits_is_written_where_its_promise_is_kept(material, tmp_path, monkeypatch):
    import onnx
    from onnx import numpy_helper

    file = tmp_path / "int8.onnx"
    faces = calibration_faces("london_faces", material / "london", "withheld")
    file.write_bytes(b"the one before")
    monkeypatch.setattr(traced, "INT8_TOLERANCE", -1.0)
    with pytest.raises(ExportError, match=r"allowed -1\).*removed"):
        export_model(material / "scorer", file, calibration=faces)
    assert file.read_bytes() == b"the one before" and list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(traced, "INT8_TOLERANCE", 1.0)
    monkeypatch.setattr(traced, "INT8_SPEARMAN", -1.0)
    report = export_model(material / "scorer", file, calibration=faces)
    assert (report["file"], report["precision"]) == (str(file), "int8") and report["max_difference"] > 0
    assert load_model(file).info.licence == "MIT"
    tensors = onnx.load(file).graph.initializer
    weights = [numpy_helper.to_array(entry) for entry in tensors if entry.data_type == onnx.TensorProto.INT8]
    most = max(int(np.abs(weight.astype(np.int64)).max()) for weight in weights)
    assert 32 < most <= 64, "two products of 7 and 8 bits fit into 16, which is what processors without VNNI add in"


def test_any_onnx_recogniser_can_judge(material, tmp_path):
    import onnx

    file = str(material / "colours.onnx")
    faces = torch.randint(256, (5, 3, 112, 112), generator=torch.Generator().manual_seed(0)).byte()
    rgb, bgr = (load_recogniser(RecogniserOptions(file, channel_order=order)) for order in ("rgb", "bgr"))
    torch.testing.assert_close(rgb.embed(faces.flip(1)), bgr.embed(faces))
    scaled = load_recogniser(RecogniserOptions(file, mean=0.0, std=255.0))
    torch.testing.assert_close(scaled.embed(faces) * 2, rgb.embed(faces), atol=1e-5, rtol=1e-4)
    assert len({network.digest for network in (rgb, bgr, scaled)}) == 3
    left = onnx.load(file)
    left.graph.input.append(onnx.helper.make_tensor_value_info("old_weight", onnx.TensorProto.FLOAT, [4, 4]))
    onnx.save(left, tmp_path / "left.onnx")
    quantised = load_recogniser(RecogniserOptions(str(tmp_path / "left.onnx")))
    torch.testing.assert_close(quantised.embed(faces), rgb.embed(faces))
    with pytest.raises(RecogniserError, match="neither a folder"):
        load_recogniser(RecogniserOptions(str(tmp_path / "nothing.onnx")))
    with pytest.raises(RecogniserError, match="bgr"):
        RecogniserOptions(file, channel_order="gbr")


def test_a_recogniser_trained_here_judges_by_its_embedding(tmp_path):
    torch.manual_seed(0)
    model = create_backbone("fd_mobilenet_x0_25", 3).eval()
    model.preprocessing = Preprocessing(image_size=64, resize=72)
    save_backbone(model, tmp_path / "london" / "model")
    recogniser = load_recogniser(RecogniserOptions(str(tmp_path / "london" / "model")))
    assert recogniser.name == "london" and len(recogniser.digest) == 64
    assert name_of(tmp_path / "variant" / "seed_3" / "model") == "variant"
    faces = torch.randint(256, (2, 3, 72, 72), generator=torch.Generator().manual_seed(0)).byte()
    expected = model.embed(model.normalization(faces[..., 4:68, 4:68].float() / 255))
    torch.testing.assert_close(recogniser.embed(faces), expected.detach())


def test_taking_the_mean_off_spreads_the_labels_of_positive_features():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 1, 16, generator=generator)
    noise = torch.rand(20, 12, 1, generator=generator) * torch.randn(20, 12, 16, generator=generator)
    features = (centres + 2 * noise).flatten(0, 1) + 10
    identities = torch.arange(20).repeat_interleave(12)
    plain, centred = (
        label_readable(features, identities, LabelOptions(min_raw=-1.0, subtract_mean=centre)).raw
        for centre in (False, True)
    )
    assert plain.std() < 0.05 < 0.1 < centred.std()
    severity = noise.flatten(0, 1).norm(dim=1)
    assert spearman(centred, -severity) > 0.8


def test_unreadable_faces_are_named_and_never_usable(material, tmp_path):
    import shutil

    root = shutil.copytree(material / "london", tmp_path / "london")
    (root / "smiling_front" / "131_08.jpg").write_bytes(b"no image")
    faces = DegradedFaces(london_faces(root, "withheld"), copies=5)
    recogniser = load_recogniser(RecogniserOptions(str(material / "colours.onnx")))
    found = label_faces(faces, recogniser, LabelOptions(min_images=6, min_raw=-1.0, batch_size=4))
    assert len(found.skipped) == 6 and "131_08.jpg" in found.skipped[0]
    assert found.labels.usable.sum() == 42 and found.labels.raw.isfinite().all()
    again = label_faces(faces, recogniser, LabelOptions(min_images=6, min_raw=-1.0, batch_size=100))
    torch.testing.assert_close(found.features, again.features)
