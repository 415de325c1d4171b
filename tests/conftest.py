"""Fixtures every test may use: folders of saved models, where larger data lie."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

torch.set_num_threads(1)
# A busy machine is slow: an example that takes long is no fault.
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tests")

# These give torch a second device (fake_device.py), which trainers in the same process would then take for a GPU:
# test_on_fake_device.py runs them in a process of their own.
ON_FAKE_DEVICE = tuple(
    Path(__file__).parent / "server" / file
    for file in (
        "placement/test_fake_device.py",
        "placement/test_serving.py",
        "targets/test_layer_stream.py",
        "targets/test_split_target.py",
    )
)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave those files out where the variable is not set."""
    return True if collection_path in ON_FAKE_DEVICE and "FAKE_DEVICE" not in os.environ else None


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def save(model: LlamaForCausalLM | Qwen3ForCausalLM, name: str = "model") -> Path:
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session", autouse=True)
def short_socket_paths() -> Iterator[None]:
    """Loader workers hand tensors over sockets below the temporary folder, whose paths may have 108 bytes at most."""
    if len(tempfile.gettempdir()) < 60:
        yield
        return
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        multiprocessing.current_process()._config["tempdir"] = folder  # type: ignore[attr-defined]
        yield


@pytest.fixture(scope="session")
def larger_data() -> Path:
    """The folder of data too large for the repository; skips where there is none."""
    folder = os.environ.get("DOVETAIL_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DOVETAIL_TEST_DATA does not name a folder with the larger test data")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests get an hour where the others get the time limit of pyproject.toml."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))
