"""Sizes of the models by name."""

from __future__ import annotations

SIZES = {
    "nano": {"depth": 4, "hidden_size": 64, "num_heads": 2},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "1p0B": {"depth": 24, "hidden_size": 1536, "num_heads": 24},
    "1p6B": {"depth": 28, "hidden_size": 1792, "num_heads": 28},
}


IWIN = {"name": "iwin", "window": 4, "kernel": 3}
