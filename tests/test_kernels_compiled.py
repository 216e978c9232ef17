"""Every tile of the table, compiled for an H100 or H200 without one: registers suffice, and so does shared memory."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernel_tests  # noqa: F401, skips this file where there is no Triton
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from supermoe.kernels import fused_ffn, gating, grouped_mm, permute, tiles
from supermoe.kernels.tiles import Tile

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024  # bytes, of one program
POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
TOKENS, EXPERTS, K = 4096, 64, 2


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Launches compile instead of running; what was compiled is collected here."""
    collected: list[Any] = []

    def launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        collected.append(compile_launch(kernel, args, settings))

    monkeypatch.setattr(JITFunction, "run", launch)
    return collected


def compile_launch(kernel: JITFunction, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    """Compile as Triton would at this launch: multiples of 16 are known, None and constants are compiled in."""
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages") if name in settings}
    values = dict(zip([p.name for p in kernel.params], args, strict=False)) | settings
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{POINTERS[value.dtype]}"
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[index,] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=HOPPER, options=options)


def assert_fits(binary: Any, folder: Path) -> None:
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert found["STACK"] == found["LOCAL"] == 0, f"{binary.metadata.name} spills registers: {found}"
    assert binary.metadata.shared <= SHARED_MEMORY


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def make_plan(rows: int) -> permute.Plan:
    num_tiles = TOKENS * K // rows + EXPERTS + 1
    sizes = [(num_tiles * rows,), (TOKENS, K), (num_tiles,), (EXPERTS + 1,)]
    return permute.Plan(rows, EXPERTS, K, *(empty(*size, dtype=torch.int32) for size in sizes))


def launches(kernel: str, itemsize: int, rows: int, tile: Tile, activation: str) -> Callable[[], object]:
    """A launch of one kernel at a usual size."""
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    dim, hidden = (256, 512) if kernel.startswith("fused") else (512, 1024)
    width = 2 * hidden if activation == "swiglu" else hidden
    plan, weight_NK = make_plan(rows), empty(TOKENS, K)
    x_ND, w_in = empty(TOKENS, dim, dtype=dtype), empty(EXPERTS, dim, width, dtype=dtype)
    w_out, z_PF = empty(EXPERTS, hidden, dim, dtype=dtype), empty(len(plan.pair_P), width, dtype=dtype)
    stacks = weight_NK, w_in, w_out, plan, activation, tile
    return {
        "up": lambda: grouped_mm.up(x_ND, w_in, plan, activation, tile, "za"),
        "down": lambda: grouped_mm.down(z_PF, w_in.transpose(1, 2), plan, tile, weight_NK),
        "hidden_grad": lambda: grouped_mm.hidden_grad(x_ND, w_out, z_PF, weight_NK, plan, activation, tile),
        "weight_grad": lambda: grouped_mm.weight_grad(x_ND, z_PF, plan, tile, gather_left=True),
        "fused_fwd": lambda: fused_ffn.fused_fwd(x_ND, *stacks),
        "fused_bwd": lambda: fused_ffn.fused_bwd(x_ND, x_ND, *stacks),
    }[kernel]


# the activations that need most: erf, and two products at once
DEMANDING = {"up": ["gelu"], "down": ["gelu"], "weight_grad": ["gelu"]}
PLANS = {(kernel, itemsize, tile): rows for (kernel, itemsize, rows), some in tiles.TILES.items() for tile in some}
CASES = [
    (kernel, itemsize, rows, tile, activation)
    for (kernel, itemsize, tile), rows in PLANS.items()
    for activation in DEMANDING.get(kernel, ["gelu", "swiglu"] if itemsize == 2 else ["gelu"])
]


@pytest.mark.parametrize(("kernel", "itemsize", "rows", "tile", "activation"), CASES)
def test_tile_fits(
    kernel: str, itemsize: int, rows: int, tile: Tile, activation: str, compiled: list[Any], tmp_path: Path
) -> None:
    launches(kernel, itemsize, rows, tile, activation)()
    (binary,) = compiled
    assert_fits(binary, tmp_path)
    assert ("wgmma" in binary.asm["ptx"]) == (itemsize == 2)  # the tensor cores of this generation


@pytest.mark.parametrize("score", gating.SCORES)
def test_router_fits(score: str, compiled: list[Any], tmp_path: Path) -> None:
    logits_NE = empty(TOKENS, EXPERTS)
    expert_NK, weight_NK, _, probs_NE, balance = gating.route_fwd(logits_NE, K, score, logits_NE[0])
    gating.route_bwd(logits_NE, expert_NK, weight_NK, score, weight_NK, probs_NE, balance)
    assert len(compiled) == 2
    for binary in compiled:
        assert_fits(binary, tmp_path)


def test_metadata_fits(compiled: list[Any], tmp_path: Path) -> None:
    plan = permute.plan(empty(TOKENS, K, dtype=torch.int64), EXPERTS, 128)
    permute.combine(empty(len(plan.pair_P), 512, dtype=torch.bfloat16), plan)
    assert len(compiled) == 4
    for binary in compiled:
        assert_fits(binary, tmp_path)
