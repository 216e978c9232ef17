"""Mixture-of-experts layers of other people behind one call, for the benchmarks of ours.

`make(name, dim, hidden, experts, k, dtype, device)` answers a module x_ND -> y_ND, or a sentence that says why the
contender cannot be had here; `CONTENDERS` lists the names. Each is a whole layer without biases: router logits,
softmax, the k best of E experts weighted by their scores (divided by their sum for k >= 2), y = sum of weight *
activation(x W_in) W_out. All of one size have the same weights: `expected` is what they have to compute, which is to be
checked before they are timed. Their classes tell the `activation`, and whether they are `exact`.

The packages are imported when a contender is made. Those for a GPU follow the sources of ScatterMoE 47b5e15,
MegaBlocks 78eea65, SonicMoE 8565e84 and Liger ead96b6, and have not been run yet.
"""

from __future__ import annotations

import atexit
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from supermoe.ops import reference


class CannotTake(Exception):
    """A contender is installed but not made for this size or device; the message says why."""


class Contender(nn.Module):
    """A whole layer; `load` gives it the weights that all contenders share."""

    activation = "gelu"
    exact = True  # False: it drops rows or draws experts, so that it computes something else
    devices = ("cpu", "cuda")
    dtypes = (torch.float32, torch.bfloat16)

    def load(self, router_ED: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor) -> None:
        """Copy the weights."""
        raise NotImplementedError


class RoutedExperts(Contender):
    """A linear router, its softmax in fp32, before experts that are told where every token goes."""

    def __init__(self, dim: int, hidden: int, experts: int, k: int):
        super().__init__()
        self.k = k
        self.router_ED = nn.Parameter(torch.empty(experts, dim))

    def forward(self, x_ND: Tensor) -> Tensor:
        """x_ND -> y_ND."""
        routing = reference.route(F.linear(x_ND, self.router_ED).float(), self.k)
        return self.run_experts(x_ND, routing.expert_NK, routing.weight_NK)

    def run_experts(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs -> y_ND."""
        raise NotImplementedError


# --- plain PyTorch ----------------------------------------------------------------------------------------------------


class Stacks(RoutedExperts):
    """Experts as two stacks."""

    def __init__(self, dim: int, hidden: int, experts: int, k: int):
        super().__init__(dim, hidden, experts, k)
        self.w_in_EDF = nn.Parameter(torch.empty(experts, dim, hidden))
        self.w_out_EFD = nn.Parameter(torch.empty(experts, hidden, dim))

    def load(self, router_ED: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor) -> None:
        copy(router_ED, self.router_ED)
        copy(w_in_EDF, self.w_in_EDF)
        copy(w_out_EFD, self.w_out_EFD)


class NaiveLoop(Stacks):
    """One expert after the other: gather, two products, index_add."""

    def run_experts(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        return reference.expert_ffn(x_ND, expert_NK, weight_NK, self.w_in_EDF, self.w_out_EFD, self.activation)


class GroupedMM(Stacks):
    """Sort, `F.grouped_mm` twice, weights in fp32, scatter-add; the backward is autograd's."""

    def run_experts(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        order = expert_NK.flatten().argsort(stable=True)
        token_R = order // self.k
        ends_E = torch.bincount(expert_NK.flatten(), minlength=len(self.w_in_EDF)).cumsum(0).to(torch.int32)
        hidden_RF = F.gelu(F.grouped_mm(x_ND[token_R], self.w_in_EDF, offs=ends_E))
        out_RD = F.grouped_mm(hidden_RF, self.w_out_EFD, offs=ends_E)
        weighted_RD = (out_RD * weight_NK.flatten()[order, None]).to(x_ND.dtype)
        return torch.zeros_like(x_ND).index_add(0, token_R, weighted_RD)


# --- on any device ----------------------------------------------------------------------------------------------------


class Transformers(RoutedExperts):
    """The experts of Hugging Face's NemotronH, which have no gate, behind `implementation`."""

    implementation = "eager"

    def __init__(self, dim: int, hidden: int, experts: int, k: int):
        super().__init__(dim, hidden, experts, k)
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        config = SimpleNamespace(
            n_routed_experts=experts,
            hidden_size=dim,
            moe_intermediate_size=hidden,
            moe_latent_size=None,
            mlp_hidden_act="gelu",
            _experts_implementation=self.implementation,
        )
        self.experts = NemotronHExperts(config)

    def run_experts(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        return self.experts(x_ND, expert_NK, weight_NK.to(x_ND.dtype))

    def load(self, router_ED: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor) -> None:
        copy(router_ED, self.router_ED)
        copy(w_in_EDF.mT, self.experts.up_proj)
        copy(w_out_EFD.mT, self.experts.down_proj)


class TransformersGroupedMM(Transformers):
    """The same experts on `F.grouped_mm`."""

    implementation = "grouped_mm"


class Tutel(Contender):
    """Tutel's own layer, dropless: rows padded to the fullest expert."""

    def __init__(self, dim: int, hidden: int, experts: int, k: int):
        super().__init__()
        from tutel import moe

        self.layer = moe.moe_layer(
            gate_type={"type": "top", "k": k, "capacity_factor": 0, "fp32_gate": True},
            model_dim=dim,
            experts={
                "type": "ffn",
                "num_experts_per_device": experts,
                "hidden_size_per_expert": hidden,
                "activation_fn": F.gelu,
                "has_fc1_bias": False,
                "has_fc2_bias": False,
            },
        )

    def forward(self, x_ND: Tensor) -> Tensor:
        """x_ND -> y_ND."""
        return self.layer(x_ND)

    def load(self, router_ED: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor) -> None:
        copy(router_ED, self.layer.gates[0].wg.weight)
        copy(w_in_EDF.mT, self.layer.experts.batched_fc1_w)
        copy(w_out_EFD, self.layer.experts.batched_fc2_w)


class Fairscale(Contender):
    """fairscale's MOELayer and Top2Gate: the second expert is drawn with Gumbel noise, room for 2 N / E rows each."""

    exact = False
    dtypes = (torch.float32,)

    def __init__(self, dim: int, hidden: int, experts: int, k: int):
        super().__init__()
        if k != 2:
            raise CannotTake(f"fairscale's gate is top-2, not top-{k}")
        from fairscale.nn.moe import MOELayer, Top2Gate

        join_group_of_one()
        linears = ((nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)) for _ in range(experts))
        self.layer = MOELayer(
            Top2Gate(dim, experts), nn.ModuleList(nn.Sequential(w_in, nn.GELU(), w_out) for w_in, w_out in linears)
        )

    def forward(self, x_ND: Tensor) -> Tensor:
        """x_ND -> y_ND; N must be a multiple of E."""
        return self.layer(x_ND[:, None])[:, 0]

    def load(self, router_ED: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor) -> None:
        copy(router_ED, self.layer.gate.wg.weight)
        for expert, w_in_DF, w_out_FD in zip(self.layer.experts, w_in_EDF, w_out_EFD, strict=True):
            copy(w_in_DF.mT, expert[0].weight)
            copy(w_out_FD.mT, expert[2].weight)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


class ScatterMoE(RoutedExperts):
    """ScatterMoE's MLP."""

    devices = ("cuda",)

    def __init__(self, dim: int, hidden: int, experts: int, k: int):
        super().__init__(dim, hidden, experts, k)
        from scattermoe.mlp import MLP

        self.experts = MLP(dim, hidden, experts, k, activation=nn.GELU())

    def run_experts(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        return self.experts(x_ND, weight_NK.to(x_ND.dtype), expert_NK)

    def load(self, router_ED: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor) -> None:
        copy(router_ED, self.router_ED)
        copy(w_in_EDF.mT, self.experts.experts.weight)
        copy(w_out_EFD.mT, self.experts.output_experts.weight)


class MegaBlocks(Contender):
    """MegaBlocks' dropless layer on grouped GEMM."""

    devices = ("cuda",)
    dtypes = (torch.bfloat16,)

    def __init__(self, dim: int, hidden: int, experts: int, k: int):
        super().__init__()
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import dMoE

        self.layer = dMoE(
            Arguments(
                hidden_size=dim,
                ffn_hidden_size=hidden,
                moe_num_experts=experts,
                moe_top_k=k,
                moe_normalize_expert_weights=1 if k > 1 else None,
                moe_loss_weight=0.0,  # else it collects router scores of every step
                activation_fn=F.gelu,
                bias=False,
                return_bias=False,
                mlp_impl="grouped",
                fp16=False,
                bf16=True,
            )
        )

    def forward(self, x_ND: Tensor) -> Tensor:
        """x_ND -> y_ND."""
        return self.layer(x_ND[:, None])[:, 0]

    def load(self, router_ED: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor) -> None:
        copy(router_ED, self.layer.router.layer.weight)
        copy(w_in_EDF.mT, self.layer.experts.mlp.w1)
        copy(w_out_EFD, self.layer.experts.mlp.w2)


class SonicMoE(Contender):
    """SonicMoE's layer."""

    devices = ("cuda",)
    dtypes = (torch.bfloat16,)

    def __init__(self, dim: int, hidden: int, experts: int, k: int):
        super().__init__()
        if k == 1 or dim < 512 or dim % 64 or hidden % 128:
            raise CannotTake("SonicMoE needs k >= 2, dim >= 512 in steps of 64 and hidden in steps of 128")
        from sonicmoe import MoE
        from sonicmoe.enums import ActivationType

        self.layer = MoE(experts, k, dim, hidden, ActivationType.GELU, add_bias=False, std=0.02)

    def forward(self, x_ND: Tensor) -> Tensor:
        """x_ND -> y_ND."""
        return self.layer(x_ND)[0]

    def load(self, router_ED: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor) -> None:
        copy(router_ED, self.layer.router.weight)
        copy(w_in_EDF.mT, self.layer.c_fc.weight)
        copy(w_out_EFD.mT, self.layer.c_proj.weight)


class Liger(RoutedExperts):
    """Liger's fused experts, which are gated."""

    activation = "swiglu"
    devices = ("cuda",)

    def __init__(self, dim: int, hidden: int, experts: int, k: int):
        super().__init__(dim, hidden, experts, k)
        from liger_kernel.ops import LigerFusedMoEFunction

        self.function = LigerFusedMoEFunction
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden))

    def run_experts(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        return self.function.apply(x_ND, self.gate_up, self.down, expert_NK.to(torch.int32), weight_NK.to(x_ND.dtype))

    def load(self, router_ED: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor) -> None:
        copy(router_ED, self.router_ED)
        copy(w_in_EDF.mT, self.gate_up)
        copy(w_out_EFD.mT, self.down)


CONTENDERS: dict[str, type[Contender]] = {
    "naive loop": NaiveLoop,
    "grouped_mm": GroupedMM,
    "transformers eager": Transformers,
    "transformers grouped_mm": TransformersGroupedMM,
    "tutel": Tutel,
    "fairscale": Fairscale,
    "scattermoe": ScatterMoE,
    "megablocks": MegaBlocks,
    "sonicmoe": SonicMoE,
    "liger": Liger,
}


def make(
    name: str, dim: int, hidden: int, experts: int, k: int, dtype: torch.dtype, device: str | torch.device
) -> Contender | str:
    """The layer of a contender with the weights that all of this size have, or why it cannot be had."""
    kind = CONTENDERS[name]
    if torch.device(device).type not in kind.devices or dtype not in kind.dtypes:
        return f"{name} takes {' or '.join(map(str, kind.dtypes))} on {' or '.join(kind.devices)} only"
    try:
        with torch.device(device):
            layer = kind(dim, hidden, experts, k)
    except (ImportError, OSError, CannotTake) as reason:
        return f"{name}: {reason}"
    layer.load(*draw(kind.activation, dim, hidden, experts))
    return layer.to(device, dtype)


def expected(name: str, x_ND: Tensor, hidden: int, experts: int, k: int) -> Tensor:
    """What a contender of this size has to compute, by the reference in the dtype of x."""
    activation = CONTENDERS[name].activation
    router_ED, w_in_EDF, w_out_EFD = (w.to(x_ND) for w in draw(activation, x_ND.shape[1], hidden, experts))
    routing = reference.route(F.linear(x_ND, router_ED), k)
    return reference.expert_ffn(x_ND, routing.expert_NK, routing.weight_NK, w_in_EDF, w_out_EFD, activation)


def draw(activation: str, dim: int, hidden: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of all contenders of one size: router_ED, w_in_EDF (2F for swiglu, gate first), w_out_EFD."""
    generator = torch.Generator().manual_seed(0)
    columns = 2 * hidden if activation == "swiglu" else hidden
    shapes = [(experts, dim), (experts, dim, columns), (experts, hidden, dim)]
    router_ED, w_in_EDF, w_out_EFD = (torch.randn(shape, generator=generator, device="cpu") for shape in shapes)
    return router_ED * dim**-0.5, w_in_EDF * dim**-0.5, w_out_EFD * hidden**-0.5


def copy(source: Tensor, target: nn.Parameter) -> None:
    """Overwrite a parameter, which may be stored in another shape with the same order."""
    with torch.no_grad():
        target.copy_(source.reshape(target.shape))


def join_group_of_one() -> None:
    """The process group without which fairscale's layer cannot be made."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(leave_group)


def leave_group() -> None:
    """End the process group, unless that has been done."""
    if dist.is_initialized():
        dist.destroy_process_group()
