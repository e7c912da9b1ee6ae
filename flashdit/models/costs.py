"""What a model costs before it exists: FLOPs and the memory of its activations, with nothing allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flashdit.models.attention import ATTENTIONS, each_attention, naming_entry
from flashdit.models.dit import FlashDiT, default_arguments
from flashdit.models.layers import mlp_width
from flashdit.models.recompute import KEPT_OPERATORS
from flashdit.models.sizes import IWIN
from iwin_core.kernels.cpu_attention import FUSED, attention_of

RECOMPUTED = ("all kept", "recomputed", "products kept")
Count = Callable[[FlashDiT, int, bool], int]
Value = TypeVar("Value", int, np.ndarray)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that a forward pass keeps for the backward pass, as it runs without torch.compile."""

    fixed: float
    """Copies of the weights in low precision, which autocast makes; whatever the batch."""
    per_image: float
    gradients: float = 0.0
    """Of an image, which a block holds besides while it goes back: of its MLP's widest map and its input."""

    def of(self, images: int) -> float:
        """Returns the bytes of a batch."""
        return self.fixed + images * self.per_image


def depth_of(options: Mapping[str, Any]) -> int:
    """Returns the number of blocks that arguments of FlashDiT ask for."""
    return (default_arguments() | dict(options))["depth"]


def of_one_block(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments of FlashDiT for its first block alone."""
    return {**options, "depth": 1, "attention": each_attention(options.get("attention", IWIN))[0]}


@dataclass(frozen=True, kw_only=True)
class Parts(Generic[Value]):
    """What is measured of a model by its parts. Blocks of one attention kind are alike."""

    outside: Value
    """Of what is in no block."""
    blocks: Sequence[tuple[int, Value]]
    """How many blocks there are of a kind, and what one of them has."""

    @property
    def sum(self) -> Value:
        """Of the whole model."""
        return self.outside + sum(count * value for count, value in self.blocks)


def measure_parts(options: Mapping[str, Any], measure: Callable[[dict[str, Any]], Value]) -> Parts[Value]:
    """Returns what is measured of a model's parts, by models of one block and of two of each attention kind.

    Args:
        options: Arguments of FlashDiT.
        measure: Returns a number, or an array of some, that a model of these arguments has.
    """
    depth, attention = depth_of(options), options.get("attention", IWIN)
    specs = [ATTENTIONS.filled(spec) for spec in each_attention(attention)]
    blocks = []
    for place, spec in enumerate(specs):
        if spec in specs[:place]:
            continue
        with naming_entry(attention, place):
            one, two = (measure({**options, "depth": n, "attention": spec}) for n in (1, 2))
        places = [place for place, other in enumerate(specs) if other == spec]
        count = sum(len(range(place, depth, len(specs))) for place in places)
        blocks.append((count, two - one, one - (two - one)))
    return Parts(outside=blocks[0][2], blocks=[(count, value) for count, value, _ in blocks])


def forward_flops(options: Mapping[str, Any]) -> int:
    """Returns the FLOPs of one image's forward pass: twice its multiply-adds, of matrix products alone.

    Args:
        options: Arguments of FlashDiT.
    """

    def count(arguments: dict[str, Any]) -> int:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = FlashDiT(**arguments).eval()
            model(*_inputs(model, 1))
        return counter.get_total_flops()

    parts = measure_parts(options, count)
    return parts.sum


def activations(
    options: Mapping[str, Any], low_precision: bool, processor: str | None = FUSED
) -> dict[str, Activations]:
    """Returns the activations of a training step by what is kept of the blocks: RECOMPUTED's names.

    Blocks that are computed again keep their inputs alone, and one block at a time keeps everything. That is
    the block to which it adds most. With products kept, their outputs stay as well, in that block too.

    Args:
        options: Arguments of FlashDiT.
        low_precision: Whether autocast to bf16 or fp16 is on.
        processor: That attention is chosen for on a CPU, None for this one; a GPU has it fused.
    """
    counted = (saved_bytes, input_bytes, product_bytes)
    with attention_of(processor):
        parts = measure_parts(options, lambda arguments: _lines(arguments, low_precision, counted))
    whole = parts.outside + sum(blocks * lines for blocks, lines in parts.blocks)
    depth = depth_of(options)
    kept, inputs, products = whole
    # What is outside of the blocks is kept in either way.
    fullest = max((lines[0] - lines[1] for _, lines in parts.blocks), key=lambda line: line[1])
    again = inputs + fullest
    also = again + products * (0, 1 - 1 / depth)
    gradients = float(_widest_gradients(options) * (2 if low_precision else 4))
    return {
        name: Activations(fixed=float(fixed), per_image=float(per_image), gradients=gradients)
        for name, (fixed, per_image) in zip(RECOMPUTED, (kept, again, also), strict=True)
    }


def _widest_gradients(options: Mapping[str, Any]) -> int:
    """Returns how many numbers the gradients of an image have in a block's MLP, where they are most."""
    filled = default_arguments() | dict(options)
    dim, is_swiglu = filled["hidden_size"], filled["mlp"] == "swiglu"
    width = mlp_width(dim, filled["mlp_ratio"], is_swiglu) * (2 if is_swiglu else 1)
    return (filled["sample_size"] // filled["patch_size"]) ** 2 * (width + dim)


def _lines(arguments: dict[str, Any], low_precision: bool, counted: Sequence[Count]) -> np.ndarray:
    """Returns (fixed, per image) of each count: lines through batches of 2 and 3.

    A batch of 1 is none of them, as some of its copies are views.
    """
    lines = []
    for count in counted:
        with FakeTensorMode():
            model = FlashDiT(**arguments).train()
            two, three = (count(model, batch, low_precision) for batch in (2, 3))
        lines.append((3 * two - 2 * three, three - two))
    return np.array(lines, dtype=object)  # Python's integers, which know no largest


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
