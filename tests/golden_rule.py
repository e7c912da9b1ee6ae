"""Golden numbers of the released code: the weight rule, the inputs and the tolerance."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
COMPUTED = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
RELATIVE_TOLERANCE = 2e-5  # of the golden tensor's standard deviation


def golden_tensor(key: str, shape) -> Tensor:
    """Returns the tensor that the rule gives an official key of this shape."""
    shape = tuple(int(side) for side in shape)
    z = np.random.default_rng(zlib.crc32(key.encode("utf-8"))).standard_normal(shape)
    if len(shape) == 1:
        value = 1.0 + 0.1 * z if key.endswith(".weight") else 0.1 * z
    elif key.endswith(("absolute_pos_embed", "embedding_table.weight")):
        value = 0.5 * z
    else:
        gain = 1.5 if key.endswith("qkv.weight") else 1.0
        value = gain * z / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32))


def golden_state(shapes) -> dict[str, Tensor]:
    """Returns {official key: tensor} for {official key: shape}, without the computed tables."""
    return {key: golden_tensor(key, shape) for key, shape in shapes.items() if key not in COMPUTED}


def golden_input(seed: int, shape) -> Tensor:
    """Returns the standard normal input `rn(seed, shape)`."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def load_json(name: str):
    """Returns a golden JSON file."""
    return json.loads((GOLDEN / name).read_text())


def load_npz(name: str) -> dict[str, np.ndarray]:
    """Returns a golden npz file as a dictionary."""
    with np.load(GOLDEN / name) as archive:
        return dict(archive)


def assert_golden(ours: Tensor, golden) -> None:
    """Asserts that every entry is within the project's tolerance of the golden tensor."""
    golden = torch.as_tensor(golden)
    limit = RELATIVE_TOLERANCE * float(golden.double().std())
    torch.testing.assert_close(ours.detach().cpu().float(), golden.float(), rtol=0, atol=limit)


def assert_summary(ours: Tensor, archive, name: str) -> None:
    """Asserts that a tensor agrees with the golden summary `name/{shape,first64,strided,mean,std,l2}`."""
    assert list(ours.shape) == archive[f"{name}/shape"].tolist()
    flat = ours.detach().reshape(-1)
    strided = archive[f"{name}/strided"]
    rows = torch.arange(len(strided)) * flat.numel() // len(strided)
    limit = RELATIVE_TOLERANCE * float(archive[f"{name}/std"])
    for got, golden in ((flat[:64], archive[f"{name}/first64"]), (flat[rows], strided)):
        torch.testing.assert_close(got, torch.from_numpy(golden), rtol=0, atol=limit)
    assert abs(float(flat.double().norm()) / float(archive[f"{name}/l2"]) - 1) < RELATIVE_TOLERANCE
