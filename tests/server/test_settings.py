from pathlib import Path

import pytest

from server.settings import Settings, SettingsError, load_settings, parse_bytes


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"DOVETAIL_{name.upper()}", raising=False)


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "dovetail.toml"
    config.write_text('port = 1\nhost = "::1"\nmax_seqs = 2\n')
    monkeypatch.setenv("DOVETAIL_PORT", "2")
    monkeypatch.setenv("DOVETAIL_HOST", "0.0.0.0")
    settings = load_settings({"port": 3}, config)
    assert (settings.port, settings.host, settings.max_seqs, settings.max_waiting) == (3, "0.0.0.0", 2, 64)


def test_settings_are_frozen_and_keep_the_key_to_themselves() -> None:
    settings = load_settings({"api_key": "secret"})
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"weights": "fp64"}, "weights: Input should be 'fp32', 'bf16', 'int8' or 'int4'"),
        ({"vram": "3 apples"}, "vram: '3 apples' is no amount of memory"),
        ({"vram": "0"}, "vram: Input should be greater than 0"),
        ({"drafter_device": "gpu"}, "drafter_device: 'gpu' is no device"),
        ({"drain_s": "inf"}, "drain_s: Input should be a finite number"),
        ({"host": ""}, "host: String should have at least 1 character"),
        ({"target": ""}, "target: String should have at least 1 character"),
        ({"threads": 0}, "threads: Input should be greater than or equal to 1"),
        ({"port": 70000}, "port: "),
        ({"visions": "x"}, "unknown setting 'visions'; known are target"),
        ({"no_llm": True, "target": "a"}, "no_llm and target 'a' contradict each other"),
        ({"cache": 0, "cache_file": "a"}, "cache_file and cache 0 contradict each other"),
        ({"cache_file": "/"}, "cache_file '/' is a folder"),
        ({"no_llm": True, "vision": ["none"]}, "no_llm and vision none leave nothing to serve"),
    ],
)
def test_faults_are_named(flags: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags)
    assert message in str(caught.value)


def test_faulty_files_are_named(tmp_path: Path) -> None:
    config = tmp_path / "dovetail.toml"
    with pytest.raises(SettingsError, match="does not exist"):
        load_settings({}, config)
    config.write_text("port =")
    with pytest.raises(SettingsError, match="is not TOML"):
        load_settings({}, config)
    config.write_text("prot = 1")
    with pytest.raises(SettingsError, match="unknown setting 'prot'"):
        load_settings({}, config)


def test_a_fault_that_is_not_on_the_command_line_tells_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "dovetail.toml"
    config.write_text("vision = 5\nmax_seqs = 0\n")
    monkeypatch.setenv("DOVETAIL_PORT", "abc")
    with pytest.raises(SettingsError) as caught:
        load_settings({"max_seqs": 0}, config)
    message = str(caught.value)
    assert f"vision: Input should be a list of texts ({config})" in message and "(DOVETAIL_PORT)" in message
    assert message.count("(") == 2
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings({}, Path("/proc/self/mem"))


@pytest.mark.parametrize(("given", "number"), [("3GiB", 3 * 2**30), ("1.5 MB", 1_500_000), ("7", 7)])
def test_amounts_of_memory(given: str, number: int) -> None:
    assert parse_bytes(given) == number


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, "dovetail"),
        ({"target": "/models/qwen/"}, "qwen"),
        ({"target": "org/x"}, "x"),
        ({"target": "a", "model_name": "b"}, "b"),
    ],
)
def test_served_name(flags: dict[str, str], name: str) -> None:
    assert load_settings(flags).served_name == name


def test_lists_come_from_repeated_flags_and_from_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings({}).vision is None
    assert load_settings({"vision": ["a", "b"]}).vision == ("a", "b")
    monkeypatch.setenv("DOVETAIL_VISION", "c, d")
    assert load_settings({}).vision == ("c", "d")
    assert load_settings({"vision_url_hosts": "images.example"}).vision_url_hosts == ("images.example",)


def test_variables_that_nothing_reads_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DOVETAIL_WEIGHT", "int8")
    monkeypatch.setenv("DOVETAIL_QQQ", "1")
    monkeypatch.setenv("DOVETAIL_THREADS", "1")
    monkeypatch.setenv("DOVETAIL_TEST_DATA", "/nowhere")
    load_settings({})
    assert [record.getMessage() for record in caplog.records] == [
        "the environment variable DOVETAIL_QQQ is not read by anything",
        "the environment variable DOVETAIL_WEIGHT is not read by anything; did you mean DOVETAIL_WEIGHTS?",
    ]
