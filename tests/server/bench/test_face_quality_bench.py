import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from server.bench.face_quality import BATCHES, PEER, LightPeer, count, markdown, measure_face_quality
from vision.serving.export import NEEDED

DOCS = Path(__file__).resolve().parents[3] / "docs" / "vision"


def test_the_peer_is_of_lightqnets_size():
    macs = 0

    def add(layer, _, output):
        nonlocal macs
        macs += output.numel() * layer.weight[0].numel()

    peer = LightPeer().eval()
    for layer in peer.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(add)
    assert peer(torch.zeros(2, 3, 96, 96)).shape == (2,)
    assert count(peer) == pytest.approx(0.45e6, rel=0.1)
    assert macs / 2 == pytest.approx(77e6, rel=0.1)


@pytest.mark.skipif(any(find_spec(name) is None for name in NEEDED), reason="not installed (extra vision)")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_every_network_and_batch_has_its_row():
    report = measure_face_quality(repeats=1, warmup=0)
    assert [(row["network"], row["batch"]) for row in report["results"]] == [
        (name, batch) for batch in BATCHES for name in ("tinyfqnet", PEER)
    ]
    assert report["networks"]["tinyfqnet"]["parameters"] == 21_801
    assert all(row["ms"] > 0 for row in report["results"])
    assert sum("over_tinyfqnet" in row for row in report["results"]) == len(BATCHES)


def test_the_documented_table_is_its_report():
    report = json.loads((DOCS / "face_quality_speed.json").read_text(encoding="utf-8"))
    assert markdown(report) in (DOCS / "face_quality.md").read_text(encoding="utf-8")
