"""Weights on disk: one safetensors file, which holds nothing but tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from supermoe.typed_yaml import UserError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write a model's state; `OSError` where that fails."""
    write_weights(path, model.state_dict(), lambda tensor: [tensor])


def write_weights(path: Path, state: Mapping[str, Tensor], rows_of: Callable[[Tensor], Iterable[Tensor]]) -> None:
    """Write tensors one after the other; of each, `rows_of` gives its rows piece by piece, in order.

    So a tensor need not be in memory whole: its shape is all that is asked of it here.
    """
    header, end = {}, 0
    for name in writing_order(state):
        tensor = state[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            for rows in rows_of(state[name]):
                file.write(rows.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def writing_order(state: Mapping[str, Tensor]) -> list[str]:
    """Names in the order of the file: wide numbers first, so that all are aligned."""
    return sorted(state, key=lambda name: (-state[name].element_size(), name))


@contextmanager
def opened_weights(path: Path, remedy: str) -> Iterator[Any]:
    """A file of weights, to read tensors or slices of them; a `UserError` with the remedy where it is not readable."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"cannot read {path}: it is missing; {remedy}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); {remedy}") from None


def read_weights(path: Path, remedy: str) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU; a `UserError` with the remedy where it is missing or damaged."""
    with opened_weights(path, remedy) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a mapping
