"""What the tests of scores share: golden values, rows to score and the plain formulas, slow and exact."""

import json
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden" / "eval"
CASES = json.loads((GOLDEN / "values.json").read_text())["cases"]


def rows(seed: int, n: int, d: int) -> np.ndarray:
    mixing = np.random.default_rng(99).standard_normal((d, d)) / d**0.5
    return (np.random.default_rng(seed).standard_normal((n, d)) @ mixing).astype(np.float32)


def normal_rows(count, dimensions, seed, mean=0.0):
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed)) + mean


def statistics(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = rows.astype(np.float64)
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


def exact_precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Distances by direct differences in float64: exact ties stay ties."""

    def squared(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return ((u[:, None].astype(np.float64) - v[None]) ** 2).sum(axis=-1)

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        radii = np.sort(squared(centres, centres), axis=1)[:, k]
        return float((squared(points, centres) <= radii).any(axis=1).mean())

    return covered(fake, real), covered(real, fake)
