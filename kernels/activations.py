"""The feed-forward's nonlinearities and their derivatives, on tiles in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

GELU, SILU, RELU2, SWIGLU = range(4)
CODES = {"gelu": GELU, "silu": SILU, "relu2": RELU2, "swiglu": SWIGLU}

_GELU, _SILU, _RELU2, _SWIGLU = (tl.constexpr(code) for code in (GELU, SILU, RELU2, SWIGLU))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Activation of a hidden tile; for swiglu that of its gate half."""
    if ACTIVATION == _GELU:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == _RELU2:
        positive = tl.maximum(z, 0.0)
        return positive * positive
    else:
        return z * tl.sigmoid(z)


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """Derivative of `activate`."""
    if ACTIVATION == _GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == _RELU2:
        return 2.0 * tl.maximum(z, 0.0)
    else:
        share = tl.sigmoid(z)
        return share * (1.0 + z * (1.0 - share))
