import numpy as np
import pytest
import torch
from metric_oracles import CASES, rows
from numpy.testing import assert_allclose

from flashdit.evaluation.metrics import kernel_distance


def test_kernel_distance_equals_golden(golden):
    case = CASES["main"]["torch_fidelity"]["kid_subset100x20_poly"]
    mean, std = kernel_distance(golden["real_pool"], golden["fake_pool"], subsets=20, subset_size=100)
    assert_allclose(mean, case["kernel_inception_distance_mean"], rtol=1e-5)
    assert_allclose(std, case["kernel_inception_distance_std"], rtol=1e-5)


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate():
    x, y = rows(31, 14, 6).astype(np.float64), rows(32, 14, 6).astype(np.float64) * 1.2
    total = 0.0
    for sign, u, v in ((1, x, x), (1, y, y), (-2, x, y)):
        for i in range(14):
            for j in range(14):
                if u is not v:
                    total += sign * (u[i] @ v[j] / 6 + 1) ** 3 / 14**2
                elif i != j:
                    total += sign * (u[i] @ v[j] / 6 + 1) ** 3 / (14 * 13)
    assert_allclose(kernel_distance(x, y, subsets=2, subset_size=14), (total, 0), rtol=1e-9, atol=1e-12)


def test_kernel_distance_leaves_the_global_generators_alone():
    x, y = rows(33, 30, 6), rows(34, 25, 6)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = kernel_distance(x, y, 5, 10)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert first == kernel_distance(x, y, 5, 10) != kernel_distance(x, y, 5, 10, seed=1)


def test_kernel_distance_is_of_100_subsets_and_seed_2020_unless_asked_otherwise():
    x, y = rows(33, 30, 6), rows(34, 25, 6)
    assert kernel_distance(x, y, subset_size=10) == kernel_distance(x, y, 100, 10, 2020)


def test_kernel_distance_of_fewer_images_than_a_subset_names_both():
    with pytest.raises(ValueError, match="subset_size=1000, real=30, fake=1200"):
        kernel_distance(np.zeros((30, 2)), np.zeros((1200, 2)))
    with pytest.raises(ValueError, match="got subsets=0"):
        kernel_distance(np.zeros((30, 2)), np.zeros((30, 2)), subsets=0, subset_size=10)
    with pytest.raises(ValueError, match="got subsets=9, subset_size=1, real=30"):
        kernel_distance(np.zeros((30, 2)), np.zeros((30, 2)), subsets=9, subset_size=1)
