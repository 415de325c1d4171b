"""The native pool and the choice of kernels."""

import pytest

from kernels import native


@pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
def test_the_pool_takes_any_size_but_none() -> None:
    before = native.num_threads()
    assert native.set_num_threads(1) == 1
    assert native.set_num_threads(before) == before
    with pytest.raises(ValueError, match="at least 1"):
        native.set_num_threads(0)


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    with (
        pytest.raises(ValueError, match="no instruction set 'mmx' here; available:"),
        native.use_instruction_set("mmx"),
    ):
        pass
