"""What does a reference's npz hold, and is it what it says? Checked before an array is read whole."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashdit.data.sources import companions_of
from flashdit.evaluation.features.extractor import Extractor
from flashdit.evaluation.features.extractors import OF_RUNS
from flashdit.evaluation.images.npz import Header, NpzSource, open_archive, read_array, read_headers

REFERENCE_RULE = "a reference must be an npz of arrays"
STORED = {"mu": "sigma", "mu_s": "sigma_s"}  # means and their covariances, ADM's keys
REFERENCE_KEYS = ("schema", "n", "extractor", "fingerprint", "image_size")  # what make-reference adds to them
EXTRACTOR_SPEC = ("extractor_spec", "extractor_weights")  # and how to build the extractor, since schema 1
REFERENCE_SCHEMA = 1
COVARIANCE_TOLERANCE = 1e-5  # of its largest entry, above what float32 features round to
ABOUT_AT_MOST = 2**16  # bytes of what a file says of itself
DEFAULT_EXTRACTOR = "inception"


def open_npz(path: Path, extractor: Extractor) -> tuple[dict[str, Tensor], dict[str, Any], NpzSource | None]:
    """Returns the stored moments of an npz, what it says of them and its images, as far as it has them.

    Raises:
        ValueError: If it is no npz, or what it holds is no reference under the extractor.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"a reference must be a data set that brings one, an npz or a folder, got {path}")
    with open_archive(path, REFERENCE_RULE) as archive:
        headers = read_headers(archive, path)
        about = read_about(archive, headers, path)
        check_about(about, path, extractor)
        check_shapes(headers, path, extractor)
        keys = [key for pair in STORED.items() for key in pair if key in headers]
        stored = {
            key: torch.from_numpy(read_array(archive, key, headers[key], path).astype(np.float64))
            for key in keys
        }
    check_values(stored, path)
    if not stored and "arr_0" not in headers:
        raise ValueError(
            f"a reference npz must hold mu and sigma, or images in arr_0, got {sorted(headers)} in {path}"
        )
    return stored, about, NpzSource(path) if "arr_0" in headers else None


def read_about(archive: zipfile.ZipFile, headers: Mapping[str, Header], path: Path) -> dict[str, Any]:
    """Returns what a file of make-reference says of itself; empty for another file."""
    about: dict[str, Any] = {}
    for key in (*REFERENCE_KEYS, *EXTRACTOR_SPEC):
        if key not in headers:
            continue
        kind = "U" if key in (*EXTRACTOR_SPEC, "extractor", "fingerprint") else "iu"
        shape = (2,) if key == "image_size" else ()
        header = headers[key]
        is_small = header.dtype.itemsize <= ABOUT_AT_MOST
        if header.shape != shape or header.dtype.kind not in kind or not is_small:
            raise ValueError(
                f"{key} of a reference must be as make-reference writes it, got {header.dtype} "
                f"{header.shape} in {path}"
            )
        about[key] = read_array(archive, key, header, path).tolist()
    if "image_size" in about:
        about["image_size"] = tuple(about["image_size"])
    return about


def check_about(about: Mapping[str, Any], path: Path, extractor: Extractor) -> None:
    """Raises ValueError for a file of make-reference of another schema or of other features."""
    if not about:
        return
    missing = sorted(set(REFERENCE_KEYS) - set(about))
    if missing or about["schema"] != REFERENCE_SCHEMA:
        got = f"no {missing}" if missing else f"schema {about['schema']}"
        raise ValueError(
            f"a file of make-reference must have all of {list(REFERENCE_KEYS)} in schema {REFERENCE_SCHEMA}, "
            f"got {got} in {path}"
        )
    if about["fingerprint"] != extractor.fingerprint:
        raise ValueError(
            f"a reference must be of the same extractor and weights, got '{about['extractor']}' "
            f"({about['fingerprint'][-12:]}) in {path} for '{extractor.name}' ({extractor.fingerprint[-12:]})"
        )


def check_shapes(headers: Mapping[str, Header], path: Path, extractor: Extractor) -> None:
    """Raises ValueError for moments without their partner, of no numbers, or of another extractor's size."""
    stored = sorted(key for pair in STORED.items() for key in pair if key in headers)
    for key in stored:
        if headers[key].dtype.kind not in "fiu":
            raise ValueError(f"{key} of a reference must be real numbers, got {headers[key].dtype} in {path}")
    dimensions = {"mu": extractor.pool_dimensions, "mu_s": extractor.spatial_dimensions}
    for mean, covariance in STORED.items():
        if (mean in headers) != (covariance in headers):
            raise ValueError(
                f"{mean} and {covariance} of a reference must come together, got {stored} in {path}"
            )
        if mean not in headers:
            continue
        shapes = headers[mean].shape, headers[covariance].shape
        if len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2:
            raise ValueError(f"{mean} must be (d,) and {covariance} (d, d), got shapes {shapes} in {path}")
        if shapes[0] != (dimensions[mean],):
            raise ValueError(
                f"{mean} must have the {dimensions[mean]} dimensions of extractor '{extractor.name}', "
                f"got {shapes[0][0]} in {path}"
            )
    if stored and "mu" not in stored:
        raise ValueError(f"a reference with mu_s must hold mu and sigma too, got {stored} in {path}")


def check_values(stored: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError for moments that are not finite, or no covariance."""
    for key, value in stored.items():
        if not value.isfinite().all():
            raise ValueError(f"{key} of a reference must be finite, got NaN or infinity in {path}")
        if value.ndim == 2:
            check_covariance(value, key, path)


def check_covariance(sigma: Tensor, key: str, path: Path) -> None:
    """Raises ValueError unless a matrix is symmetric and has no negative variance, but for rounding."""
    allowed = COVARIANCE_TOLERANCE * sigma.abs().max().item()
    asymmetry = (sigma - sigma.T).abs().max().item()
    if asymmetry > allowed:
        raise ValueError(
            f"{key} must be a covariance, which is symmetric, got entries {asymmetry:.2g} from their mirrors "
            f"in {path}"
        )
    _, failed_at = torch.linalg.cholesky_ex(sigma + allowed * torch.eye(len(sigma), dtype=sigma.dtype))
    if failed_at and allowed:
        raise ValueError(f"{key} must be a covariance, which has no negative variance, got one in {path}")


def extractor_of(reference: str) -> tuple[str, str | None]:
    """Returns name and weights, as `build_extractor` takes them, of the extractor that a reference goes with.

    That is the one that its data set brings, the one that a file of make-reference names, or else Inception.

    Raises:
        ValueError: If the file names one that only its user can point to.
    """
    companions = companions_of(reference)
    path = Path(reference)
    if companions.extractor or companions.reference or not path.is_file():
        return companions.extractor or DEFAULT_EXTRACTOR, None
    with open_archive(path, REFERENCE_RULE) as archive:
        about = read_about(archive, read_headers(archive, path), path)
    if "extractor" not in about:
        return DEFAULT_EXTRACTOR, None
    name, weights = about.get("extractor_spec", about["extractor"]), about.get("extractor_weights") or None
    needed = next((part for part in (name, weights) if part and Path(part).is_absolute()), None)
    if (name == OF_RUNS and not weights) or ":" in name or (needed and not Path(needed).exists()):
        # What a file names is not imported: its author would run code on its reader's machine.
        where = f", of {needed}, which is not there" if needed else f" ({name})" if ":" in name else ""
        raise ValueError(
            f"{path} was made with extractor '{about['extractor']}'{where}: give it by --extractor or "
            "evaluation.extractor"
        )
    return name, weights
