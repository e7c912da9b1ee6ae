"""Which parameters decay: by a rule of the task, or by texts in their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from flashdit.training.optim import OptimizerOptions


def decay_groups(
    model: nn.Module, options: OptimizerOptions, decays: Callable[[str, Tensor], bool]
) -> list[dict[str, Any]]:
    """Returns the optimiser's groups of the parameters that train: those that decay, then the others if any.

    Args:
        model: Whose parameters they are.
        options: Of the optimiser; its `no_decay` takes the place of the rule.
        decays: The rule: whether a parameter of a name decays.
    """
    texts = options.no_decay

    def is_in(name: str, parameter: Tensor) -> bool:
        return decays(name, parameter) if texts is None else not any(text in name for text in texts)

    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if is_in(name, parameter)]
    others = [parameter for name, parameter in trained if not is_in(name, parameter)]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def unused_texts(model: nn.Module, texts: Sequence[str] | None) -> str:
    """Returns in words which texts of `optimizer.no_decay` are in no parameter's name; empty for none."""
    names = [name for name, _ in model.named_parameters()]
    unused = [text for text in texts or () if not any(text in name for name in names)]
    return f"optimizer.no_decay: no parameter has {', '.join(unused)} in its name" if unused else ""
