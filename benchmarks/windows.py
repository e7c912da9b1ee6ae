"""Softmax attention on this CPU, fused and by products: `python -m benchmarks.windows` rewrites the table.

iwin_core/kernels/cpu_attention.json then has this processor's measurements beside those of others, and
iwin_core chooses by them. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.side_by_side import machine, results_path
from flashdit.shared.process import keep_freed_memory
from iwin_core.kernels.cpu_attention import (
    FUSED,
    GAIN,
    KEPT,
    PRODUCTS,
    TABLE,
    backward_by_products,
    by_products,
    read_table,
    this_processor,
)

TOKENS = (4, 9, 16, 20, 25, 36, 49, 64, 68, 81, 100, 144, 196, 256, 576, 1024, 4096)
"""Windows of 2 to 16 a side, of 4 and 8 with four registers, and global attention."""
HEAD_WIDTHS = (16, 24, 32, 48, 64, 72, 96, 128)
VALUES = 2**21  # of q: what a batch of a dozen images has in a layer


def make_run(way: str, tokens: int, width: int, dtype: torch.dtype, gradient: bool) -> Callable[[], None]:
    """Returns a run of one way on q, k and v as a qkv projection leaves them, with its backward pass."""
    products = by_products if tokens <= KEPT else backward_by_products
    attention: Callable[..., Tensor] = products if way == PRODUCTS else F.scaled_dot_product_attention
    heads = 8
    windows = max(1, VALUES // (tokens * heads * width))
    draws = torch.Generator().manual_seed(0)
    qkv = torch.randn(windows, tokens, 3, heads, width, generator=draws).to(dtype).requires_grad_(gradient)
    upstream = torch.randn(windows, tokens, heads, width, generator=draws).to(dtype).transpose(1, 2)

    def run() -> None:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(dim=2))
        with torch.set_grad_enabled(gradient):
            out = attention(q, k, v)
        if gradient:
            out.backward(upstream)
            qkv.grad = None

    return run


def measure(tokens: int, width: int, dtype: torch.dtype, gradient: bool, rounds: int) -> dict[str, Any]:
    """Returns the processor milliseconds of both ways: medians of rounds taken in turn, after a warm-up."""
    runs = {way: make_run(way, tokens, width, dtype, gradient) for way in (FUSED, PRODUCTS)}
    taken: dict[str, list[float]] = {way: [] for way in runs}
    for number in range(rounds + 1):
        for way, run in runs.items():
            started = time.process_time()
            run()
            if number:
                taken[way].append(1e3 * (time.process_time() - started))
    name = str(dtype).removeprefix("torch.")
    case = {"tokens": tokens, "head_width": width, "dtype": name, "gradient": gradient}
    return case | {f"{way}_ms": round(statistics.median(times), 3) for way, times in taken.items()}


def as_markdown(processor: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Returns how many times as fast products are, a row for each number of tokens."""
    found = {tuple(row[key] for key in ("tokens", "head_width", "dtype", "gradient")): row for row in rows}
    columns = list(dict.fromkeys((row["dtype"], row["gradient"]) for row in rows))
    widths = list(dict.fromkeys(row["head_width"] for row in rows))
    parts = [
        f"`python -m benchmarks.windows`: {processor} ({about['processor']}), 1 thread, load "
        f"{about['load_before']:.1f} before, torch {about['torch']}. How many times as fast as the fused "
        f"kernel two products and a softmax are; from {GAIN} on they are taken."
    ]
    for dtype, gradient in columns:
        what = "forward and backward" if gradient else "forward"
        parts += ["", f"{dtype}, {what}; tokens of a window by width of a head:", ""]
        parts.append(f"| | {' | '.join(map(str, widths))} |")
        parts.append(f"|---:|{'---:|' * len(widths)}")
        for tokens in dict.fromkeys(key[0] for key in found if key[2:] == (dtype, gradient)):
            of_row = [found[tokens, width, dtype, gradient] for width in widths]
            cells = (f"{row['fused_ms'] / row['products_ms']:.2f}" for row in of_row)
            parts.append(f"| {tokens} | {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def as_json(table: dict[str, Any]) -> str:
    """Returns the measurements by processor as JSON, each case on a line of its own."""
    parts = []
    for processor, found in table.items():
        rows = ",\n".join(json.dumps(row) for row in found["rows"])
        parts.append(f'"{processor}": {{"about": {json.dumps(found["about"])}, "rows": [\n{rows}]}}')
    return "{" + ",\n".join(parts) + "}\n"


def main() -> None:
    """Measures every case and writes the table and its Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="measured anew (default: all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = machine() | {"rounds": arguments.rounds}
    keep_freed_memory()
    cases = [
        (tokens, width, dtype, gradient)
        for dtype in (torch.float32, torch.bfloat16)
        for gradient in (False, True)
        for tokens in arguments.tokens
        if gradient or tokens <= KEPT  # else both are the fused kernel
        for width in HEAD_WIDTHS
    ]
    rows = [measure(*case, arguments.rounds) for case in tqdm(cases, "windows", unit="case")]
    processor, known = this_processor(), read_table()
    kept = known.get(processor, {"rows": []})["rows"]
    rows += [row for row in kept if row["tokens"] not in arguments.tokens]
    rows.sort(key=lambda row: (row["dtype"] != "float32", row["gradient"], row["tokens"]))
    TABLE.write_text(as_json(known | {processor: {"about": about, "rows": rows}}))
    text = as_markdown(processor, about, rows)
    results_path("windows.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
