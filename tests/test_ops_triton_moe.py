from __future__ import annotations

import kernel_tests  # noqa: F401, skips this file where there is no Triton
import pytest
import torch

from supermoe import ops
from supermoe.ops import choice, triton_moe


def experts(dim: int, hidden: int, dtype: torch.dtype) -> list[object]:
    shapes = [(4, dim), (2, dim, hidden), (2, hidden, dim)]
    x_ND, w_in, w_out = (torch.zeros(*shape, dtype=dtype) for shape in shapes)
    return [x_ND, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), w_in, w_out, "gelu", False]


def test_what_the_kernels_take() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert triton_moe.refusal("expert_ffn", *experts(8, 24, dtype)) is None
    for score in ("softmax", "sigmoid"):
        assert triton_moe.refusal("route", torch.zeros(4, 3), 2, score, None) is None


def test_refusals_name_the_reason() -> None:
    assert "not in float64" in str(triton_moe.refusal("expert_ffn", *experts(8, 24, torch.float64)))
    mixed = experts(8, 24, torch.bfloat16)
    mixed[3] = mixed[3].float()
    assert "not in bfloat16 and float32" in str(triton_moe.refusal("expert_ffn", *mixed))
    assert "multiples of 8, not [8, 12]" in str(triton_moe.refusal("expert_ffn", *experts(8, 12, torch.float32)))
    assert "float32, not bfloat16" in str(triton_moe.refusal("route", torch.zeros(4, 3).bfloat16(), 2, "softmax", None))
    assert "1 to 3 choices, not 'softmax' and 4" in str(
        triton_moe.refusal("route", torch.zeros(4, 3), 4, "softmax", None)
    )
    assert "up to 1024 experts, not 2000" in str(triton_moe.refusal("route", torch.zeros(1, 2000), 2, "softmax", None))


def test_first_choice_on_a_gpu_and_none_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(iter(choice.BACKENDS)) == "triton"
    assert choice.BACKENDS["triton"].devices == ("cuda",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ops.backends()["triton"] == "off: it runs on cuda, and there is no such device here"
    with pytest.raises(ValueError, match="'triton' cannot be used here"):
        ops.use("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ops.backends()["triton"].startswith("active: our own kernels")
