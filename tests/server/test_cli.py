import importlib.metadata
import json
import subprocess
import sys
import tomllib
import types
from dataclasses import dataclass

import pytest
import torch
from command_line import refusal
from safetensors.torch import save_file
from typer.main import get_command
from typer.testing import CliRunner

from server import cli

ANSWER = "Grüße 🌍, one two three. STOP and more"
GREEN = "\x1b[32m"


@pytest.fixture
def launch(monkeypatch, make_settings):
    """Stands in for loading: ``launch.model`` is what the commands get, ``launch.settings`` what they asked for."""
    module = types.ModuleType("server.launch")

    def load_model(settings):
        module.settings = settings
        if isinstance(module.model, Exception):
            raise module.model
        return module.model

    module.load_model = load_model
    monkeypatch.setitem(sys.modules, "server.launch", module)
    return module


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["dovetail", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, capsys.readouterr().err


def test_generate_prints_the_text_and_the_figures(launch, make_model):
    launch.model = make_model()
    result = run("generate", "one", "--max-tokens", "100")
    assert result.stdout == f"one{ANSWER}\n", "nothing but the text, which may be piped on"
    assert "tokens/s, acceptance length 2." in result.stderr
    assert not launch.model.engine.alive


def test_accepted_drafts_have_another_colour(launch, make_model, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    launch.model = make_model()
    coloured = run("generate", "one", "--max-tokens", "100").stdout.splitlines()[0]
    launch.model = make_model(size=1)
    plain = run("generate", "one", "--max-tokens", "100", "--no-draft").stdout.splitlines()[0]
    assert GREEN in coloured
    assert GREEN not in plain


def test_generate_json_ends_with_one_object(launch, make_model):
    launch.model = make_model()
    result = run("generate", "one", "--json", "--max-tokens", "7", "--temperature", "0.5", "--seed", "3")
    answer = json.loads(result.stdout.splitlines()[-1])
    ids = launch.model.codec.encode(ANSWER)[:7]
    assert answer["token_ids"] == ids
    assert answer["text"] == launch.model.codec.decode(ids)
    assert answer["usage"]["completion_tokens"] == 7
    assert answer["finish_reason"] == "length"
    assert {"draft_rounds", "draft_n", "draft_n_accepted", "acceptance_length", "tokens_per_s"} <= set(
        answer["timings"]
    )
    request = launch.model.engine.submitted[0]
    assert (request.sampling.temperature, request.sampling.seed, request.draft) == (0.5, 3, True)


def test_flags_become_settings(launch, make_model):
    launch.model = make_model()
    run("generate", "one", "some/model", "--rows", "9", "--top-k", "3", "--depth", "4", "--drafter", "x", "--json")
    settings = launch.settings
    assert (settings.target, settings.rows, settings.top_k, settings.depth, settings.drafter) == (
        "some/model", 9, 3, 4, "x",
    )  # fmt: skip
    assert settings.max_seqs == 1
    launch.model = make_model()
    run("generate", "one", "--no-draft", "--json")
    assert launch.settings.drafter == "none"
    assert not launch.model.engine.submitted[0].draft


def test_serve_hands_its_settings_on(launch, monkeypatch, make_settings):
    served = []
    monkeypatch.setattr("server.app.serve", lambda settings, load, worker: served.append((settings, load)))
    launch.vision_worker = lambda settings: None
    run("serve", "some/model", "--port", "0", "--strict", "--max-seqs", "2", "--api-key", "k")
    (settings, load) = served[0]
    assert load is launch.load_model
    assert (settings.target, settings.port, settings.strict, settings.max_seqs) == ("some/model", 0, True, 2)
    assert settings.keys == ("k",)


def test_settings_are_shown_with_where_they_come_from_and_keys_are_not(make_settings, monkeypatch, tmp_path):
    monkeypatch.setenv("DOVETAIL_PORT", "8001")
    file = tmp_path / "mine.toml"
    file.write_text('host = "::1"\n')
    shown = run("serve", "--show-settings", "--max-seqs", "2", "--api-key", "s3cret", "--config", str(file)).stdout
    for line in ("port = 8001  # DOVETAIL_PORT", "max_seqs = 2  # command line", f'host = "::1"  # {file}',
                 "strict = false  # default", "# target is not set  # default"):  # fmt: skip
        assert line in shown.splitlines()
    assert "s3cret" not in shown
    assert tomllib.loads(shown)["vision_url_hosts"] == []


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-", "2>/dev/full"])
def test_closed_and_full_standard_streams_change_no_exit_code(closed):
    command = f"'{sys.executable}' -c 'from server.cli import main; main()' plan nowhere/at/all {closed}"
    assert subprocess.run(["bash", "-c", command], check=False, capture_output=True).returncode == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "x", "--weights", "int3"], 2, "Input should be 'fp32', 'bf16', 'int8' or 'int4'"),
        (["generate", "x", "--config", "nowhere.toml"], 2, "nowhere.toml does not exist"),
        (["generate", "x" * 300], 1, "maximum context length is 200"),
        (["generate", "a\udcff"], 1, "lone surrogate"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    launch, make_model, monkeypatch, capsys, tmp_path, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    launch.model = make_model()
    given, told = run_main(monkeypatch, capsys, *arguments)
    assert given == code
    assert message in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--no-draft", "--drafter", "y"], "contradicts"),
        (["generate", "x", "--max-tokens", "0"], "max-tokens"),
        (["generate"], "missing argument"),
        (["train", "language-model", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_usage_errors_have_their_own_exit_code(arguments, message):
    assert run(*arguments).exit_code == 2
    assert message in refusal(*arguments).lower()


def test_the_version_is_that_of_the_distribution():
    assert run("--version").stdout == f"dovetail {importlib.metadata.version('dovetail-server')}\n"


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_help_lists_the_values_a_choice_may_have(command):
    options = {option.name: option for option in get_command(cli.app).commands[command].params}
    assert options["weights"].metavar == "[fp32|bf16|int8|int4]"
    assert options["kv_cache"].metavar == "[bf16|int8]"


def test_loading_errors_are_told(launch, monkeypatch, capsys):
    launch.model = ValueError("model.safetensors is cut short")
    assert run_main(monkeypatch, capsys, "generate", "x") == (1, "dovetail: model.safetensors is cut short\n")


def test_a_failing_engine_is_told(launch, make_model, monkeypatch, capsys):
    launch.model = make_model(script=lambda request: [(70,), None])
    assert run_main(monkeypatch, capsys, "generate", "x", "--json") == (1, "dovetail: secret detail\n")


def test_train_prints_its_report(monkeypatch, tmp_path):
    @dataclass
    class Report:
        final: dict[str, float]

    module = types.ModuleType("server.feature_source")
    module.DrafterTraining = lambda recipe, resume: Report({"loss": recipe["x"], "resumed": float(resume)})
    monkeypatch.setitem(sys.modules, "server.feature_source", module)
    (tmp_path / "recipe.toml").write_text("x = 2")
    result = run("train", "drafter", str(tmp_path / "recipe.toml"), "--resume")
    assert json.loads(result.stdout.splitlines()[-1]) == {"final": {"loss": 2, "resumed": 1.0}}


def test_convert_prints_what_it_wrote(tmp_path):
    (tmp_path / "eagle").mkdir()
    assert run("convert", str(tmp_path / "nowhere"), str(tmp_path / "out")).exit_code == 2
    hidden, inner, vocab = 8, 12, 20
    config = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 2, "vocab_size": vocab}
    (tmp_path / "eagle" / "config.json").write_text(json.dumps(config))
    square, wide = torch.zeros(hidden, hidden), torch.zeros(inner, hidden)
    state = {f"layers.0.self_attn.{name}_proj.weight": square.clone() for name in "qkvo"}
    state |= {f"layers.0.mlp.{name}_proj.weight": wide.clone() for name in ("gate", "up")}
    state["layers.0.mlp.down_proj.weight"] = torch.zeros(hidden, inner)
    state["layers.0.post_attention_layernorm.weight"] = torch.zeros(hidden)
    save_file(state | {"fc.weight": torch.zeros(hidden, 2 * hidden)}, tmp_path / "eagle" / "model.safetensors")
    result = run("convert", str(tmp_path / "eagle"), str(tmp_path / "out"))
    report = json.loads(result.stdout.splitlines()[-1])
    assert (report["kind"], report["output"], report["num_blocks"]) == ("eagle", str(tmp_path / "out"), 1)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from server import cli;"
        "assert CliRunner().invoke(cli.app, ['serve', '--help']).exit_code == 0;"
        "sys.exit(bool({'torch', 'transformers', 'fastapi'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_serve_passes_vision_on_and_may_do_without_a_language_model(launch, monkeypatch):
    from server import app

    served = []
    monkeypatch.setattr(app, "serve", lambda *arguments: served.append(arguments))
    launch.vision_worker = lambda settings: ("worker", settings.vision)
    assert run("serve", "--vision", "a", "--vision", "b").exit_code == 0
    assert run("serve", "--no-llm", "--vision", "a").exit_code == 0
    (_, load, worker), (_, no_load, _) = served
    assert (load, no_load, worker) == (launch.load_model, None, ("worker", ("a", "b")))


def test_vision_models_are_found_and_named(tmp_path, make_settings, monkeypatch):
    from server import launch

    for name in ("one", "two", "deep/one", "tiny", "cats/model", "dogs/model"):
        (tmp_path / name).mkdir(parents=True)

    def names(*paths, **settings):
        worker = launch.vision_worker(make_settings(vision=[str(tmp_path / path) for path in paths], **settings))
        return worker.names

    monkeypatch.setattr(launch, "ASSETS", tmp_path)
    assert names("one", "two") == ("one", "two")
    assert names("tiny", no_llm=True) == ("tiny",)
    assert names("cats/model", "dogs/model") == ("cats", "dogs"), "training calls every folder model"
    for paths in (("one", "deep/one"), ("tiny",)):
        with pytest.raises(launch.LaunchError, match="two models would be served as"):
            names(*paths)
    with pytest.raises(launch.LaunchError, match="no such folder"):
        names("three")
    assert launch.vision_worker(make_settings()) is None
    with pytest.raises(launch.LaunchError, match="--no-llm needs --vision"):
        launch.vision_worker(make_settings(no_llm=True))
    (tmp_path / "detector").mkdir()
    assert launch.vision_worker(make_settings()).names == ("detector",)
    assert launch.vision_worker(make_settings(vision=["none"])) is None


def test_detect_prints_and_draws(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from PIL import Image
    from tiny_detector import encoded, halves, write_tiny_detector

    model = write_tiny_detector(tmp_path / "halves")
    image, drawn = tmp_path / "a.png", tmp_path / "drawn.png"
    image.write_bytes(encoded(halves()))
    result = run("detect", str(image), "--model", str(model), "--json", "--draw", str(drawn))
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["image"] == {"width": 64, "height": 48}
    assert [entry["class_name"] for entry in answer["detections"]] == ["red"]
    with Image.open(drawn) as picture:
        assert picture.size == (64, 48)
    assert "red" in run("detect", str(image), "--model", str(model)).stdout
    assert run("detect", str(image), str(image), "--model", str(model), "--draw", str(drawn)).exit_code == 2
