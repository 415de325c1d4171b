"""Plans keep their budget, agree with published sizes and speeds, and are refused in one sentence."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from command_line import refusal, run
from hypothesis import given, settings
from hypothesis import strategies as st

from server.own_models import default_target
from server.placement.cost import (
    PASS_MS,
    REACHED_SHARE,
    Choice,
    MeasuredCosts,
    Rates,
    cpu_ms,
    measured_ms,
    predict,
    streaming_break_even,
)
from server.placement.plan import MAX_BLOCKS, Request, choices, make_plan, place, with_stream
from server.placement.shape import SHAPES, WEIGHT_BYTES, PlanError, TargetShape, read_shape
from server.placement.what_if import parse_what_if

GIB = 2**30
SEVEN, THIRTEEN = SHAPES["llama2-7b"], SHAPES["llama2-13b"]
CARD = Rates(40.0, 500.0, gpu_gb_per_s=200.0, gpu_tflops=5.0)
# Llama-2-7B in fp32 by eager torch on a Xeon 4214R (57 GB/s is what its 2.12 tokens/s read), beside an RTX 2080 SUPER.
PAGE = Path(__file__).parents[3] / "docs" / "placement.md"
PAPER = "cores=24,bandwidth=57,engine=torch,gpu_bandwidth=448,gpu_tflops=22,pcie=12,acceptance=5.9,blocks=5,rows=16"


def test_models_have_their_published_numbers_of_parameters() -> None:
    assert (SEVEN.num_parameters, THIRTEEN.num_parameters) == (6_738_415_616, 13_015_864_320)
    assert SHAPES["smollm2-135m"].num_parameters == 134_515_008, "a tied head counts once"


@pytest.mark.parametrize(
    ("shape", "blocks", "gigabytes"),
    [(SEVEN, 1, 1.063), (SEVEN, 5, 2.682), (SEVEN, 6, 3.087), (THIRTEEN, 1, 1.499), (THIRTEEN, 5, 4.037)],
)
def test_drafters_have_the_papers_bytes(shape: TargetShape, blocks: int, gigabytes: float) -> None:
    request = Request(shape, "fp32", 2048, 24 * GIB)
    placed = place(request, Choice(blocks, shape.vocab_size, 0, 16, 5, on_gpu=True))
    assert placed.drafter_bytes == pytest.approx(gigabytes * 1e9, rel=0.001)
    assert placed.gpu_kv_bytes == 2048 * 4 * blocks * shape.num_kv_heads * shape.head_dim
    assert placed.cpu_bytes == 4 * shape.num_parameters + 2048 * 8 * shape.num_layers * shape.hidden_size


@pytest.mark.parametrize(("gib", "layers", "total_gib"), [(3, 0, 2.50), (7, 10, 6.27)])
def test_the_papers_two_settings_fit_their_budgets(gib: int, layers: int, total_gib: float) -> None:
    plan = make_plan(Request(SEVEN, "fp32", 1024, gib * GIB, 5, layers, 16), CARD)
    placed = plan.placement
    assert placed.drafter_bytes + placed.gpu_layer_bytes == pytest.approx(total_gib * GIB, rel=0.02)


@pytest.mark.parametrize(("vram", "layers", "published"), [("3GiB", 0, 2.77), ("7GiB", 10, 3.78)])
def test_the_simulator_gives_the_papers_speed_ups_within_a_fifth(vram: str, layers: int, published: float) -> None:
    result = run("plan", "llama2-7b", "--weights", "fp32", "--vram", vram, "--what-if", f"{PAPER},layers={layers}")
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["predicted"]["speedup"] == pytest.approx(published, rel=0.2)
    assert report["predicted"]["plain_tokens_per_s"] == pytest.approx(2.12, rel=0.1)


shapes = st.builds(
    lambda heads, groups, dim, wide, layers, vocab, tied: TargetShape(
        "any", heads * groups * dim, wide, layers, heads * groups, heads, dim, vocab, tied, 8192
    ),
    st.integers(1, 8), st.integers(1, 4), st.sampled_from([16, 64, 128]), st.integers(64, 15000), st.integers(1, 12),
    st.integers(100, 200_000), st.booleans(),
)  # fmt: skip
rates = st.builds(
    Rates, st.floats(1, 500), st.floats(1, 50_000), st.floats(1, 4000), st.floats(0.1, 1000), st.floats(0.5, 60),
    st.floats(0, 500), st.booleans(),
)  # fmt: skip


@settings(max_examples=60)
@given(
    shapes,
    rates,
    st.sampled_from(sorted(WEIGHT_BYTES)),
    st.integers(1, 8192),
    st.integers(1, 30 * GIB),
    st.sampled_from([0, 256]),
)
def test_no_plan_exceeds_its_budget_and_the_best_is_the_best(
    shape: TargetShape, machine: Rates, weights: str, context: int, budget: int, block: int
) -> None:
    request = Request(shape, weights, context, budget, pinned_rows=8, stream_block=block)
    everything = [place(request, choice) for choice in choices(request)]
    try:
        plan = make_plan(request, machine)
    except PlanError as refused:
        least = min(each.gpu_bytes for each in everything)
        assert least > budget and f"needs {least} bytes" in str(refused)
        assert make_plan(dataclasses.replace(request, budget_bytes=least), machine).placement.gpu_bytes == least
        return
    for each in (plan, *plan.alternatives):
        assert each.placement.gpu_bytes <= budget
    speeds = [
        predict(shape, weights, context, machine, each.choice).tokens_per_s
        for each in everything
        if each.gpu_bytes <= budget
    ]
    assert plan.prediction.tokens_per_s == max(speeds)
    assert all(plan.prediction.tokens_per_s >= each.prediction.tokens_per_s for each in plan.alternatives)


@settings(max_examples=30)
@given(shapes, rates, st.integers(1, 4096))
def test_more_memory_never_makes_a_plan_slower(shape: TargetShape, machine: Rates, context: int) -> None:
    request = Request(shape, "int4", context, 10**15, pinned_rows=8)
    best = make_plan(request, machine)
    enough = make_plan(dataclasses.replace(request, budget_bytes=best.placement.gpu_bytes), machine)
    assert enough.prediction == best.prediction


def test_without_a_gpu_everything_is_on_the_cpu_and_drafting_may_be_left_out() -> None:
    plan = make_plan(Request(SEVEN, "int4", 2048, None), Rates(40.0, 500.0))
    assert plan.placement.gpu_bytes == 0 and plan.placement.choice.gpu_layers == 0
    slow_arithmetic = make_plan(Request(SEVEN, "int4", 2048, None), Rates(1000.0, 10.0))
    assert slow_arithmetic.placement.choice.num_blocks == 0
    assert slow_arithmetic.prediction.tokens_per_s == pytest.approx(slow_arithmetic.plain_tokens_per_s)


def test_a_pass_is_its_layers_its_head_and_what_every_pass_takes() -> None:
    costs = MeasuredCosts({1: 1.0, 8: 2.4}, {1: 3.0, 8: 10.0}, 0.2, 0.1)
    assert measured_ms(costs, 10, 1) == pytest.approx(0.2 + 10 + 3)
    assert measured_ms(costs, 10, 4.5) == pytest.approx(0.2 + 17 + 6.5)
    shape = SHAPES["smollm2-135m"]
    layers, head = shape.num_layers * shape.layer_parameters, shape.vocab_size * shape.hidden_size
    num_bytes = layers * 0.5625 + head * 1.0625  # the head is never held in four bits
    found = cpu_ms(shape, "int4", 0, Rates(10.0, 1e6), shape.num_layers, True, 1)
    assert found == pytest.approx(PASS_MS + num_bytes / 10e6)


def test_large_vocabularies_get_a_trimmed_head_where_memory_is_short() -> None:
    plan = make_plan(Request(SHAPES["llama3-8b"], "int4", 1024, 2 * GIB), CARD)
    assert plan.placement.choice.head_rows == 32_768
    whole = place(plan.request, dataclasses.replace(plan.placement.choice, head_rows=128_256))
    assert whole.gpu_bytes - plan.placement.gpu_bytes == 2 * (128_256 - 32_768) * 4096


def test_shapes_come_from_configurations(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    shape = read_shape(str(tmp_path))
    assert (shape.head_dim, shape.num_kv_heads, shape.tied, shape.name) == (16, 2, True, tmp_path.name)


def test_a_gguf_files_header_is_enough_and_its_own_bytes_are_planned_with() -> None:
    file = default_target()
    shape = read_shape(str(file))
    assert dataclasses.replace(shape, name="smollm2-135m", stored_bytes=None) == SHAPES["smollm2-135m"]
    assert shape.stored_bytes == pytest.approx(20 / 32, rel=0.1), "Q4_1: 20 bytes for 32 weights"
    report = json.loads(run("plan", file, "--what-if", "cores=4").stdout.splitlines()[-1])
    assert report["weights"] == "stored" and report["placement"]["cpu_bytes"] < 3 * file.stat().st_size, (
        "an embedding in fp32 beside the file's codes"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no object"),
        ("{", "cannot be read"),
        ('{"hidden_size": 64}', "no whole number for intermediate_size"),
        ('{"text_config": [1]}', "text_config"),
        ('{"hidden_size": 64, "intermediate_size": 1, "num_hidden_layers": 2, "num_attention_heads": 0, '
         '"vocab_size": 9}',
         "num_heads is 0"),
        ('{"hidden_size": 64, "intermediate_size": 1, "num_hidden_layers": 2, "num_attention_heads": 4, '
         '"vocab_size": 9, "max_position_embeddings": -5}', "max_context is -5"),
    ],
)  # fmt: skip
def test_bad_configurations_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert message in refusal("plan", tmp_path, "--what-if", "cores=2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama2-7b", "--vram", "500MiB"], "the smallest needs 1163935744 bytes (1.08 GiB)"),
        (["llama2-7b", "--vram", "0"], "a budget is above 0 bytes"),
        (["llama2-7b", "--vram", "3 apples"], "no amount of memory"),
        (["llama2-7b", "--context", "5000"], "llama2-7b allows 1 to 4096"),
        (["llama2-7b", "--weights", "int3"], "allowed are fp32, bf16, int8, int4"),
        (["llama9"], "none of llama2-7b"),
        (["x.gguf"], "x.gguf cannot be read: No such file"),
        (["llama2-7b", "--weights", "stored"], "allowed are fp32, bf16, int8, int4"),
        (["llama2-7b", "--vram", "8GiB", "--what-if", "vram=4GiB"], "more than the card's"),
        (["llama2-7b", "--what-if", "core=4"], "did you mean cores?"),
        (["llama2-7b", "--what-if", "cores=x"], "cores is 'x'"),
        (["llama2-7b", "--what-if", "bandwidth=0"], "it must be above 0"),
        (["llama2-7b", "--what-if", "bandwidth=nan"], "it must be above 0"),
        (["llama2-7b", "--what-if", "engine=cuda"], "allowed are native and torch"),
        (["llama2-7b", "--what-if", f"blocks={MAX_BLOCKS + 1}"], "a drafter has 1 to 6"),
        (["llama2-7b", "--what-if", "vram=9GiB,layers=33"], "llama2-7b has 32"),
        (["llama2-7b", "--what-if", "layers=3"], "without GPU memory (vram) every layer is on the CPU"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], message: str) -> None:
    given = arguments if "--what-if" in arguments else [*arguments, "--what-if", "cores=4"]
    assert message in refusal("plan", *given)


def test_the_machine_that_is_here_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.placement import machine

    monkeypatch.setattr(machine, "cpu_limits", lambda: (20.0, 300.0))
    report = json.loads(run("plan", "smollm2-135m").stdout.splitlines()[-1])
    assert (report["machine"]["bandwidth"], report["machine"]["dots"]) == (20.0, 300.0)
    assert {"shape", "budget_bytes", "placement", "predicted", "alternatives"} <= set(report)
    assert report["assumed"] == ["acceptance length"]


@pytest.mark.parametrize(("name", "begins"), [("plan.svg", b"<?xml"), ("plan.png", b"\x89PNG")])
def test_a_plan_is_drawn_on_request(tmp_path: Path, name: str, begins: bytes) -> None:
    result = run("plan", "llama2-7b", "--what-if", "cores=4,vram=7GiB", "--picture", tmp_path / name)
    assert result.exit_code == 0 and (tmp_path / name).read_bytes().startswith(begins)
    assert "no .png or .svg file" in refusal("plan", "1B", "--what-if", "cores=4", "--picture", tmp_path / "x.pdf")


def test_streaming_layers_pays_from_some_sixty_tokens_on_as_published() -> None:
    # 7B in 16 bits over 12 GB/s against 0.7 TFLOP/s on the CPU, which are 350 G multiply-adds/s; about 15 in 4 bits.
    machine = Rates(40.0, 350 / REACHED_SHARE, gpu_gb_per_s=448.0, gpu_tflops=1e6, bus_gb_per_s=12.0)
    wide = dataclasses.replace(machine, dot_gmac_per_s=2 * machine.dot_gmac_per_s)
    assert streaming_break_even(SEVEN, "bf16", wide) == pytest.approx(60, rel=0.05)
    assert streaming_break_even(SEVEN, "int4", machine) == pytest.approx(16, abs=2)
    assert streaming_break_even(SEVEN, "int8", dataclasses.replace(machine, gpu_tflops=0.5)) is None
    assert streaming_break_even(SEVEN, "int8", Rates(40.0, 350.0)) is None


def test_prompts_are_streamed_where_that_pays_and_fits_and_else_it_is_said_why_not() -> None:
    machine = Rates(40.0, 500.0, gpu_gb_per_s=448.0, gpu_tflops=20.0, bus_gb_per_s=1.0)
    request = Request(SEVEN, "int8", 2048, 4 * GIB)
    streamed, why_not = with_stream(request, machine)
    least = streaming_break_even(SEVEN, "int8", machine) or 0
    assert not why_not and streamed.stream_block % 64 == 0 and 0 <= streamed.stream_block - 2 * least < 64
    placed = make_plan(streamed, machine).placement
    assert placed.stream_bytes > 2 * SEVEN.block_parameters and placed.gpu_bytes <= 4 * GIB
    for other, rates, reason in (
        (request, dataclasses.replace(machine, gpu_tflops=0.1), "the CPU reads a prompt of any length sooner"),
        (dataclasses.replace(request, context=256), machine, "and a prompt has 256 at most"),
        (dataclasses.replace(request, budget_bytes=2 * GIB), machine, "no room for layers that pass through"),
    ):
        assert with_stream(other, rates)[0] is other and reason in with_stream(other, rates)[1]
    report = run("plan", "llama2-7b", "--stream-prefill", "--what-if", "vram=4GiB,cores=8,gpu_tflops=9").stdout
    assert json.loads(report.splitlines()[-1])["placement"]["stream_bytes"] > 0


def page_examples() -> list[tuple[str, str, str]]:
    """Command, plan and prediction of the page's table of examples."""
    rows = re.findall(r"^\|[^|]*\| `dovetail (plan [^`]*)` \|([^|]*)\|([^|]*)\|$", PAGE.read_text(), re.MULTILINE)
    return [(command, plan.strip(), predicted.strip()) for command, plan, predicted in rows]


@pytest.mark.parametrize(("command", "plan", "predicted"), page_examples())
def test_the_pages_examples_are_what_its_commands_print(command: str, plan: str, predicted: str) -> None:
    report = json.loads(run(*shlex.split(command)).stdout.splitlines()[-1])
    placed, found = report["placement"], report["predicted"]
    layers = f", {placed['gpu_layers']} layers" if placed["gpu_layers"] else ""
    where = "" if placed["drafter_device"] == "gpu" else " on the CPU"
    assert plan == f"{placed['drafter_blocks']} block{where}{layers}, {placed['rows']} rows"
    assert predicted.replace(" tokens/s", "") == f"{found['tokens_per_s']:.1f}, {found['speedup']:.1f} x"


def test_the_page_has_an_example_of_each_kind_and_the_papers_figures() -> None:
    page, commands = PAGE.read_text(), [command for command, _, _ in page_examples()]
    for part in ("vram=3GiB", "vram=7GiB", "vram=12GiB", "cores=40"):
        assert any(part in command for command in commands)
    for vram, layers in (("3GiB", 0), ("7GiB", 10)):
        arguments = ("--weights", "fp32", "--vram", vram, "--what-if", f"{PAPER},layers={layers}")
        found = json.loads(run("plan", "llama2-7b", *arguments).stdout.splitlines()[-1])["predicted"]["speedup"]
        assert re.search(rf"\| {vram[0]} GB \| [\d.]+ x \| {found:.2f} x \|", page)


def test_what_if_reads_units() -> None:
    assert parse_what_if("cores=16, bandwidth=80,vram=4GiB,gpu_tflops=10,pcie=12").vram == 4 * GIB


def test_a_card_that_is_here_is_planned_for_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.placement import machine
    from server.placement.what_if import MARGIN_BYTES

    card = machine.Gpu("card", 4 * GIB, 3 * GIB, 180.0, 6.0, 11.0, 9.0, 14.0, 12.0)
    monkeypatch.setattr(machine, "cpu_limits", lambda: (20.0, 300.0))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(machine, "measure_gpu", lambda device: card)
    report = json.loads(run("plan", "llama2-7b").stdout.splitlines()[-1])
    assert report["budget_bytes"] == 3 * GIB - MARGIN_BYTES >= report["placement"]["gpu_bytes"]
    found = report["machine"]
    assert (found["gpu_bandwidth"], found["gpu_tflops"], found["pcie"], found["latency_us"]) == (180.0, 6.0, 9.0, 14.0)
    assert "more than card has" in refusal("plan", "llama2-7b", "--vram", "5GiB")
