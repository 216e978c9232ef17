"""Weights on disk: one safetensors file, which holds nothing but tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from supermoe.typed_yaml import UserError


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write a model's state; `OSError` where that fails."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(weights, path)
    except SafetensorError as error:  # the library wraps the operating system's errors
        raise OSError(str(error)) from error


def read_weights(path: Path, remedy: str) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU; a `UserError` with the remedy where it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"cannot read {path}: it is missing; {remedy}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); {remedy}") from None
