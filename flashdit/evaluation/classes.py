"""Which class does a label mean? Samples, reference and extractor may number the same names differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdit.evaluation.features.extractor import Extractor
from flashdit.evaluation.images.sources import Source
from flashdit.shared.registry import counted

UNKNOWN_NAMED = 3  # classes in a sentence


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of an evaluation; scores are computed on labels that are their numbers.

    Attributes:
        names: What each number is called: the extractor's logits in their order where it knows all classes of
            the samples, else the samples' labels; then the classes that the reference alone has.
        unknown: Why the extractor's logits are not over the samples' classes; empty where they are.
        note: What a report must say of how they were matched; empty where that is certain.
    """

    names: dict[int, str]
    unknown: str = ""
    note: str = ""

    def name_of(self, label: int) -> str:
        """Returns what a class is called."""
        return self.names.get(label, f"class {label}")

    def numbered(self, labels: Tensor | None, source: Source | None) -> Tensor | None:
        """Returns labels of a source by these numbers; as they are where it does not name them."""
        theirs = names_of(source, self.names)
        if labels is None or not theirs or theirs.items() <= self.names.items():
            return labels
        numbers = {name: number for number, name in self.names.items()}
        table = torch.arange(max(int(labels.max()), *theirs) + 1)
        for label, name in theirs.items():
            table[label] = numbers.get(name, label)
        return table[labels]


def names_of(source: Any, known: Mapping[int, str]) -> dict[int, str] | None:
    """Returns what a source's labels are called, None where it does not say.

    Args:
        source: The images; its labels may be called by the numbers of the known classes.
        known: The other side's classes.
    """
    names = getattr(source, "class_names", None)
    if names is None:
        return None
    by_number = names and all(name.isdecimal() and int(name) in known for name in names.values())
    if by_number and not set(names.values()) <= set(known.values()):
        return {label: known[int(name)] for label, name in names.items()}
    return dict(names)


def match_classes(extractor: Extractor, samples: Source, reference: Source | None) -> Classes:
    """Returns the classes of an evaluation, matched by name.

    Args:
        extractor: Its `class_names` are those of its logits, where they have any.
        samples: Without names its labels are taken for the extractor's numbers.
        reference: None where it has no images.
    """
    columns = dict(enumerate(extractor.class_names or ()))
    theirs = names_of(samples, columns)
    unknown, note = why_unknown(extractor, columns, theirs, samples.labels), ""
    if theirs is None and columns and samples.labels is not None and not unknown:
        note = (
            f"'{samples.name}' does not name its classes: its labels are taken for the numbers of those of "
            f"extractor '{extractor.name}'"
        )
    names = dict(theirs or ()) if unknown else columns
    for name in (names_of(reference, names) or {}).values():
        if name not in names.values():
            names[max(names, default=-1) + 1] = name
    return Classes(names=names, unknown=unknown, note=note)


def why_unknown(
    extractor: Extractor, columns: Mapping[int, str], theirs: Mapping[int, str] | None, labels: Tensor | None
) -> str:
    """Returns why an extractor does not know classes by name, or labels by number; empty where it does."""
    who = f"extractor '{extractor.name}'"
    if not columns:
        return f"{who} has no classes"
    if theirs is None:
        lowest, highest = (0, 0) if labels is None else (int(labels.min()), int(labels.max()))
        fit = lowest >= 0 and highest < len(columns)
        classes = counted(len(columns), "class", "classes")
        return "" if fit else f"{who} has {classes}, labels are from {lowest} to {highest}"
    if not theirs:
        return "the samples have no classes"
    if theirs == columns:  # even where two have one name
        return ""
    known = list(columns.values())
    missing = [name for name in theirs.values() if name not in known]
    doubled = sorted({name for name in theirs.values() if [*known, *theirs.values()].count(name) > 2})
    if missing:
        more = f" and {len(missing) - UNKNOWN_NAMED:,} more" if missing[UNKNOWN_NAMED:] else ""
        classes = counted(len(theirs), "class", "classes")
        return f"{who} does not know {', '.join(missing[:UNKNOWN_NAMED])}{more} of {classes}"
    return f"several classes are called {', '.join(doubled[:UNKNOWN_NAMED])}" if doubled else ""
