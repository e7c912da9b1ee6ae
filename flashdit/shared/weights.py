"""Files of weights: tensors by name out of a safetensors file, a torch file or a folder, and nothing else."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from safetensors.torch import load_file
from torch import Tensor

from flashdit.shared.files import read_checked_json

WRAPPERS = ("ema", "model", "state_dict")
"""Keys under which training code stores the tensors, the preferred one first."""
PREFIXES = ("module.", "_orig_mod.")
"""Prefixes of names that DDP and torch.compile add."""


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Returns the tensors by name, on the CPU, without wrappers.

    Args:
        path: A .safetensors file, a file of torch.save, or a folder of .safetensors files.

    Raises:
        ValueError: If there are no tensors, or a file cannot be read or holds other objects.
    """
    path = Path(path)
    if not path.is_dir():
        return unwrap(read_content(path), path)
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= read_content(file)
    if not tensors:
        raise ValueError(f"a checkpoint must hold weights, got no .safetensors file in {path}")
    return tensors


def read_model_config(folder: Path) -> dict[str, Any]:
    """Returns the config.json of a model folder, as `save_pretrained` writes it; empty where there is none.

    Raises:
        ValueError: If it cannot be read.
    """
    path = folder / "config.json"
    try:
        return read_checked_json(path) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"a model's configuration must be JSON, {path} is not: {error}") from error


def read_content(path: Path) -> Any:
    """Returns what a .safetensors file or a file of torch.save holds, on the CPU: no pickle is executed.

    Raises:
        ValueError: If the file is missing, damaged, or holds more than tensors and plain containers.
    """
    if not path.is_file():
        raise ValueError(f"weights must be a file, got {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with catch_warnings():  # torch's advice on the file's kind; what it cannot read is an error below
            simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as it has readers
        kind = "safetensors" if path.suffix == ".safetensors" else "torch (weights_only=True)"
        raise ValueError(
            f"weights must be a readable {kind} file, {path} is not: {_reason(error)}"
        ) from error


def tensors_crc32(tensors: Mapping[str, Tensor]) -> str:
    """Returns the CRC-32 of tensors, in the order of their names, as hexadecimal digits."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].cpu().flatten().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def tensors_sha256(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """Returns the SHA-256 of a text and of tensors, their names, types and shapes, as hexadecimal digits."""
    digest = hashlib.sha256(about.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    """Returns in a clause what torch and safetensors say in paragraphs."""
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)", text)
    if found:
        remedy = "where you trust it, store its tensors alone in a new file"
        return f"it holds {found[1]}, which is code to run; {remedy}"
    if isinstance(error, UnpicklingError):
        return "it was not written by torch.save"
    return text.partition("\n")[0].partition(". ")[0] or f"it is empty ({type(error).__name__})"


def unwrap(content: Any, source: object = "a mapping") -> dict[str, Tensor]:
    """Returns the tensors of a file's content by name, out of its wrappers and without prefixes.

    Other values beside the tensors, such as a step, are left out.

    Args:
        content: Tensors by name, at the top or under one of `WRAPPERS`.
        source: Where it comes from, for the error message.

    Raises:
        ValueError: If it does not hold tensors by name.
    """
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            tensors = {_bare(key): value for key, value in content.items() if isinstance(value, Tensor)}
            if tensors:
                return tensors
            break
        content = inner
    raise ValueError(f"weights must be tensors by name, got a {type(content).__name__} of others in {source}")


def _bare(key: str) -> str:
    """Returns the name without the prefixes that DDP and torch.compile add."""
    while key.startswith(PREFIXES):
        key = key.partition(".")[2]
    return key
