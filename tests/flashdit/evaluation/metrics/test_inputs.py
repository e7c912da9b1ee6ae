import numpy as np
import pytest
import torch
from metric_oracles import exact_precision_recall, rows, statistics
from numpy.testing import assert_allclose

from flashdit.evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall


def layouts(values: np.ndarray) -> dict[str, object]:
    """The same numbers as users hold them."""
    read_only = values.copy()
    read_only.setflags(write=False)
    return {
        "float64": values.astype(np.float64),
        "long double": values.astype(np.longdouble),
        "read-only": read_only,
        "Fortran": np.asfortranarray(values),
        "strided": np.repeat(values, 2, axis=0)[::2],
        "reversed": values[::-1].copy()[::-1],
        "big-endian": values.astype(">f4"),
        "tensor": torch.from_numpy(values.copy()),
        "Fortran tensor": torch.from_numpy(np.asfortranarray(values)),
        "with gradient": torch.from_numpy(values.copy()).requires_grad_(),
    }


def test_scores_do_not_depend_on_the_layout_of_their_input():
    x, y = rows(12, 50, 8), rows(13, 40, 8) * 0.9 + 0.1
    for name in layouts(x):
        real, fake = layouts(x)[name], layouts(y)[name]
        assert precision_recall(real, fake) == exact_precision_recall(x, y), name
        assert inception_score(fake) == inception_score(y), name
        assert kernel_distance(real, fake, 3, 20) == kernel_distance(x, y, 3, 20), name
        parts = [part.astype(np.float32) for part in (*statistics(x), *statistics(y))]
        given = [layouts(part)[name] for part in parts]
        assert_allclose(frechet_distance(*given), frechet_distance(*parts), rtol=1e-12)


def test_scores_take_float16():
    x, y = (rows(seed, 50, 8).astype(np.float16) for seed in (12, 13))
    assert precision_recall(x, y) == exact_precision_recall(x, y)
    assert inception_score(x) == inception_score(x.astype(np.float64))
    assert kernel_distance(x, y, 3, 20) == kernel_distance(x.astype(np.float64), y.astype(np.float64), 3, 20)


@pytest.mark.parametrize("score", [precision_recall, kernel_distance])
def test_scores_of_two_sets_name_what_they_cannot_read(score):
    good = np.zeros((9, 2))
    for bad, message in [
        (
            np.zeros((9, 3)),
            r"features must be \(n, d\) and \(m, d\) with one d, got shapes \(\(9, 2\), \(9, 3\)\)",
        ),
        (np.zeros(9), r"with one d, got shapes \(\(9, 2\), \(9,\)\)"),
        (np.full((9, 2), np.nan), "fake features must be finite, got 18 entries that are not"),
        (np.diag([np.inf] * 9)[:, :2], "fake features must be finite, got 2 entries that are not"),
        (np.zeros((9, 2), int), "fake features must be real floats, got int64"),
        (torch.zeros(9, 2, dtype=torch.uint8), "fake features must be real floats, got torch.uint8"),
        (np.zeros((0, 2)), "fake=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            score(good, bad)
    with pytest.raises(ValueError, match=r"got shapes \(\(9, 0\), \(9, 0\)\)"):
        score(good[:, :0], good[:, :0])
