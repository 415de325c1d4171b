import json

import pytest
import torch

from kernels import native
from server.commands import doctor


@pytest.fixture
def same_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_doctor_prints_one_json_line_and_how_to_get_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, same_threads: object
) -> None:
    missing = doctor.Extra("no_such_module", "nothing", "pip-install-something-with-a-long-name")
    monkeypatch.setattr(doctor, "EXTRAS", {"nothing": missing})
    monkeypatch.setenv("COLUMNS", "40")
    doctor.doctor()
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["devices"][0] == "cpu" and report["hardware"]["stream_gb_per_s"] > 0
    assert report["versions"]["torch"] == torch.__version__
    assert report["extras"]["nothing"]["present"] is False
    assert report["extras"]["nothing"]["install"] in "".join(
        line.split("│")[2].strip() for line in captured.err.splitlines() if line.count("│") == 3
    ), "however narrow the terminal, nothing of it is cut"


def test_missing_assets_are_told(tmp_path: object) -> None:
    from pathlib import Path

    assert doctor.asset(Path(str(tmp_path)) / "target")["present"] is False


def test_the_kernel_is_named_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.kernels()
    if native.library() is not None:
        assert found["chosen"] == found["available"][0] == native.instruction_set()
        assert found["chosen"] in found["reason"] and "fastest" in found["reason"]
    monkeypatch.setattr(native, "library", lambda: None)
    found = doctor.kernels()
    assert found["chosen"] == "reference" and "torch's own products" in found["reason"]
