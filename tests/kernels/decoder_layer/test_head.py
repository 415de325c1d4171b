"""What is read off the LM head, and the norm before it, against torch."""

import pytest
import torch

from kernels import native
from kernels.decoder_layer import Norm, head_top_k, normalise
from kernels.linear_lowbit import linear, pack

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")


@pytest.mark.parametrize("name", native.available_instruction_sets())
@pytest.mark.parametrize("vocabulary", [1, 31, 500, 4096])
@pytest.mark.parametrize("top_k", [1, 4, 40])
def test_top_k_equals_log_softmax_of_the_products(name: str, vocabulary: int, top_k: int) -> None:
    torch.manual_seed(0)
    head, rows = pack(torch.randn(vocabulary, 64), 32), torch.randn(5, 64)
    with native.use_instruction_set(name):
        logits = linear(rows, head)
        ids, log_probs = head_top_k(rows, head, top_k)
    want, want_ids = torch.log_softmax(logits.double(), dim=-1).topk(min(top_k, vocabulary))
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(log_probs.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_a_row_does_not_depend_on_those_beside_it(bits: int) -> None:
    torch.manual_seed(0)
    head, rows = pack(torch.randn(500, 64), bits), torch.randn(70, 64)
    ids, log_probs = head_top_k(rows, head, 6)
    for row in (0, 7, 69):
        alone_ids, alone = head_top_k(rows[row : row + 1], head, 6)
        assert torch.equal(alone_ids[0], ids[row])
        assert torch.equal(alone[0], log_probs[row])


def test_equal_logits_go_to_the_smaller_id_and_no_number_to_some_id() -> None:
    head = pack(torch.ones(100, 64), 32)
    ids, log_probs = head_top_k(torch.ones(1, 64), head, 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(log_probs, torch.full((1, 5), 1 / 100).log())
    ids, log_probs = head_top_k(torch.full((1, 64), float("nan")), head, 5)
    assert sorted(ids[0].tolist()) == [0, 1, 2, 3, 4]
    assert log_probs.isnan().all()


def test_norm_of_each_row() -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(9, 100), torch.rand(100)
    bias = torch.rand(100)
    for norm, want in (
        (Norm(weight, 1e-5), torch.nn.functional.rms_norm(rows, (100,), weight, 1e-5)),
        (Norm(weight, 1e-5, bias, True), torch.nn.functional.layer_norm(rows, (100,), weight, bias, 1e-5)),
    ):
        torch.testing.assert_close(normalise(rows, norm), want)
        assert torch.equal(normalise(rows, norm)[3:4], normalise(rows[3:4].contiguous(), norm))


def test_wrong_widths_are_refused() -> None:
    head = pack(torch.ones(100, 64), 32)
    with pytest.raises(ValueError, match=r"\[rows, 64\]"):
        head_top_k(torch.ones(1, 32), head, 5)
    with pytest.raises(ValueError, match=r"\[rows, 64\]"):
        normalise(torch.ones(2, 32), Norm(torch.ones(64), 1e-6))
