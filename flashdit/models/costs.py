"""What a model costs before it exists: FLOPs and the memory of its activations, with nothing allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flashdit.models.dit import FlashDiT
from flashdit.models.recompute import KEPT_OPERATORS
from iwin_core.kernels.cpu_attention import FUSED, attention_of

RECOMPUTED = ("all kept", "recomputed", "products kept")
Count = Callable[[FlashDiT, int, bool], int]


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that a forward pass keeps for the backward pass, as it runs without torch.compile."""

    fixed: float
    """Copies of the weights in low precision, which autocast makes; whatever the batch."""
    per_image: float

    def of(self, images: int) -> float:
        """Returns the bytes of a batch."""
        return self.fixed + images * self.per_image


def depth_of(options: Mapping[str, Any]) -> int:
    """Returns the number of blocks that arguments of FlashDiT ask for."""
    return options.get("depth", signature(FlashDiT.__init__).parameters["depth"].default)


def forward_flops(options: Mapping[str, Any]) -> int:
    """Returns the FLOPs of one image's forward pass: twice its multiply-adds, of matrix products alone.

    They are counted of one block and of two, which are alike.

    Args:
        options: Arguments of FlashDiT.
    """
    counts = []
    for blocks in (1, 2):
        as_deep: dict[str, Any] = {**options, "depth": blocks}
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = FlashDiT(**as_deep).eval()
            model(*_inputs(model, 1))
        counts.append(counter.get_total_flops())
    return counts[0] + (depth_of(options) - 1) * (counts[1] - counts[0])


def activations(
    options: Mapping[str, Any], low_precision: bool, processor: str | None = FUSED
) -> dict[str, Activations]:
    """Returns the activations of a training step by what is kept of the blocks: RECOMPUTED's names.

    Blocks that are computed again keep their inputs alone, and one block at a time keeps everything:
    inputs + (all − inputs) / depth. With products kept, their outputs stay as well, in that block too.

    Args:
        options: Arguments of FlashDiT.
        low_precision: Whether autocast to bf16 or fp16 is on.
        processor: That attention is chosen for on a CPU, None for this one; a GPU has it fused.
    """
    depth = depth_of(options)
    with attention_of(processor):
        kept, inputs, products = (
            _measure(options, depth, low_precision, count)
            for count in (saved_bytes, input_bytes, product_bytes)
        )
    fixed, per_image = (kept.fixed - inputs.fixed) / depth, (kept.per_image - inputs.per_image) / depth
    again = Activations(fixed=inputs.fixed + fixed, per_image=inputs.per_image + per_image)
    also = products.per_image * (1 - 1 / depth)
    return dict(zip(RECOMPUTED, (kept, again, replace(again, per_image=again.per_image + also)), strict=True))


def _measure(options: Mapping[str, Any], depth: int, low_precision: bool, count: Count) -> Activations:
    """Returns what is counted as lines through batches of 2 and 3 and depths of 1 and 2: blocks are alike.

    A batch of 1 is none of them, as some of its copies are views.
    """
    lines = []
    for blocks in (1, 2):
        as_deep: dict[str, Any] = {**options, "depth": blocks}
        with FakeTensorMode():
            model = FlashDiT(**as_deep).train()
            two, three = (count(model, batch, low_precision) for batch in (2, 3))
        lines.append(Activations(fixed=3 * two - 2 * three, per_image=three - two))
    shallow, deeper = lines
    return Activations(
        fixed=shallow.fixed + (depth - 1) * (deeper.fixed - shallow.fixed),
        per_image=shallow.per_image + (depth - 1) * (deeper.per_image - shallow.per_image),
    )


def input_bytes(model: FlashDiT, batch: int, low_precision: bool) -> int:
    """Returns the bytes that autograd saves where blocks are computed again."""
    model.enable_gradient_checkpointing()
    return saved_bytes(model, batch, low_precision)


def product_bytes(model: FlashDiT, batch: int, low_precision: bool) -> int:
    """Returns the bytes of the outputs of matrix products and attention, which `keep_matmuls` keeps."""
    with Products() as products, torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        model(*_inputs(model, batch))
    return products.total


class Products(TorchDispatchMode):
    """Sums the bytes of the outputs of KEPT's operators."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator."""
        out = function(*args, **(kwargs or {}))
        if function in KEPT_OPERATORS:
            tensors = (tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor))
            self.total += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        return out


def saved_bytes(model: FlashDiT, batch: int, low_precision: bool) -> int:
    """Returns the bytes of what autograd saves in a forward pass beside what the model holds, each once.

    Args:
        model: On the CPU, real or fake.
        batch: Images.
        low_precision: Whether autocast is on; it counts as bf16, whose size fp16 has too.
    """
    held = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that none is freed and its id taken by another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            storages[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            v_t = model(*_inputs(model, batch))
        v_t.float().square().mean()
    return sum(storage.nbytes() for storage in storages.values())


def _inputs(model: FlashDiT, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns latents, times and labels of the training size."""
    channels, side = model.config["in_channels"], model.config["sample_size"]
    return (
        torch.zeros(batch, channels, side, side),
        torch.zeros(batch),
        torch.zeros(batch, dtype=torch.int64),
    )
