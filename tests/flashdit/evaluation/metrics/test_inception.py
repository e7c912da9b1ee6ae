import numpy as np
import pytest
from metric_oracles import CASES
from numpy.testing import assert_allclose

from flashdit.evaluation.metrics import inception_score


@pytest.mark.parametrize("order", ["logits", "logits_sorted_by_class"])
@pytest.mark.parametrize("split_size", [5000, 250, 200, 125, 100, 50])
def test_inception_score_equals_golden_with_a_short_last_chunk_too(golden, order, split_size):
    key = f"inception_score{order[6:]}_by_split_size"
    mean, std = inception_score(golden[order], split_size)
    exact = CASES["main"]["exact_float64"][key][str(split_size)]
    assert_allclose(mean, exact[0], rtol=1e-9)
    assert_allclose(std, exact[1], atol=1e-9)
    assert_allclose(mean, CASES["main"]["adm_tf"][key][str(split_size)], rtol=1e-6)


def test_inception_score_of_extreme_logits_is_finite_and_right():
    logits = np.full((6, 5), -1e4, dtype=np.float32)
    logits[np.arange(6), np.arange(6) % 3] = 1e4  # three classes certain, two impossible
    assert_allclose(inception_score(logits), (3.0, 0.0), rtol=1e-12)


@pytest.mark.parametrize("scale", [1, 100, 700, 1e4, 1e30])
def test_inception_score_equals_slow_sums_however_unlikely_a_class(scale):
    logits = (np.random.default_rng(3).standard_normal((60, 7)) * scale).astype(np.float32)
    logits[:, 2] -= np.float32(800 * scale)  # probability exactly zero
    logits[5, 3] = logits[5].max() - np.float32(745)  # the smallest number above zero, where scale allows

    def slow(chunk: np.ndarray) -> float:
        shifted = chunk.astype(np.float64) - chunk.max(axis=1, keepdims=True)
        p = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
        q = p.mean(axis=0)
        terms = [
            p[i, c] * (np.log(p[i, c]) - np.log(q[c]))
            for i, c in np.ndindex(*p.shape)
            if p[i, c] > 0 and q[c] > 0
        ]
        return float(np.exp(sum(terms) / len(p)))

    scores = [slow(logits[start : start + 25]) for start in (0, 25, 50)]
    assert_allclose(inception_score(logits, 25), (np.mean(scores), np.std(scores)), rtol=1e-9, atol=1e-12)


def test_inception_score_takes_chunks_of_5000_rows_unless_asked_otherwise():
    logits = np.random.default_rng(4).standard_normal((5200, 3))
    assert inception_score(logits) == inception_score(logits, 5000) != inception_score(logits, 5200)


def test_inception_score_names_what_it_was_given():
    with pytest.raises(ValueError, match="logits must be finite, got 1 entries"):
        inception_score(np.array([[0.0, np.inf]]))
    with pytest.raises(ValueError, match=r"split_size ≥ 1, got shape=\(2, 3\), split_size=0"):
        inception_score(np.zeros((2, 3)), split_size=0)
    for empty in (np.zeros((0, 3)), np.zeros(3)):
        with pytest.raises(ValueError, match=r"needs logits \(n, classes\)"):
            inception_score(empty)
    with pytest.raises(ValueError, match="logits must be real floats, got int64"):
        inception_score(np.zeros((2, 3), int))
