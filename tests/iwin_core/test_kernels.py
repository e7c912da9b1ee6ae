import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from iwin_core import IwinAttention, kernels
from iwin_core.kernels.dispatch import checked, device_runs_kernels

ROOT = Path(__file__).parents[2]
CHECKS = Path(__file__).with_name("kernel_checks.py")
POINTERS_32 = {"lse", "grad_norms", "shares"}
SHAPE = {"HEADS": 2, "D": 12, "BLOCK_D": 16, "PACK_H": 1, "INTERLEAVED": True}
SMALL = SHAPE | {"MH": 4, "MW": 4, "PACK_W": 4, "BLOCKS": 1, "TILE": 64}
LARGE = SHAPE | {"MH": 9, "MW": 9, "PACK_W": 1, "BLOCKS": 2, "TILE": 64}
CONV = {"C": 48, "KH": 3, "KW": 3, "ROWS": 4, "COLUMNS": 16, "BLOCK_C": 64}


@pytest.fixture
def backend():
    """Returns `set_backend`, undone after the test."""
    before = kernels.set_backend("auto")
    yield kernels.set_backend
    kernels.set_backend(before)


@pytest.mark.parametrize("interpreted", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_kernels_equal_their_eager_twins(interpreted):
    pytest.importorskip("triton")
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    command = [sys.executable, "-m", "pytest", str(CHECKS), "-p", "no:cacheprovider"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("file", "kernel", "constants"),
    [
        ("attention_kernels", "forward_kernel", SMALL | {"NORMED": True}),
        ("attention_kernels", "backward_kernel", SMALL | {"NORMED": False}),
        ("attention_kernels", "backward_blocks_kernel", LARGE | {"NORMED": True}),
        ("conv_kernels", "forward_kernel", CONV | {"ADDED": True}),
        ("conv_kernels", "backward_kernel", CONV),
    ],
)
def test_kernels_compile_for_hopper_without_a_gpu(file, kernel, constants):
    triton = pytest.importorskip("triton")
    function = getattr(__import__(f"iwin_core.kernels.{file}", fromlist=[kernel]), kernel)
    constants = (
        constants if constants.get("NORMED", True) else constants | {"q_weight": None, "k_weight": None}
    )
    integers, floats = {"height", "width"}, {"scale", "plain_scale", "eps"}
    signature = {
        name: "constexpr"
        if name in constants
        else "i32"
        if name in integers
        else "fp32"
        if name in floats
        else "*fp32"
        if name in POINTERS_32
        else "*bf16"
        for name in function.arg_names
    }
    compiled = triton.compile(
        triton.compiler.ASTSource(function, signature, constants),
        target=triton.backends.compiler.GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True},
    )
    assert ("wgmma" in compiled.asm["ptx"]) == (file == "attention_kernels")
    assert compiled.asm["cubin"]


def test_kernels_are_left_alone_on_a_cpu_and_refused_where_demanded(backend):
    module, x = IwinAttention(16, 2, 4), torch.randn(1, 7, 9, 16)
    chosen = module(x)
    backend("eager")
    torch.testing.assert_close(module(x), chosen, rtol=0, atol=0)
    backend("triton")
    with pytest.raises(ValueError, match=r"kernel backend 'triton' needs a CUDA device .* got device=cpu"):
        module(x)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 8, 272), {"num_heads": 2}, "maps of rank 2, got rank=1"),
        ((1, 8, 9, 272), {"num_heads": 2}, "heads up to 128 channels wide, got head_dim=136"),
        ((1, 8, 9, 16), {"window": (17, 4)}, r"windows up to 16, got window=\(17, 4\)"),
        ((1, 8, 9, 16), {"dtype": torch.float64}, "float32, bfloat16 and float16, got dtype=torch.float64"),
        ((1, 8, 9, 16), {"norms": [nn.LayerNorm(8)] * 2}, "RMSNorm .* or no norm, got LayerNorm"),
        ((1, 8, 9, 16), {"norms": [nn.RMSNorm(8)] * 2}, "RMSNorm with a weight and one eps .* got RMSNorm"),
        ((1, 8, 9, 16), {"norms": [nn.RMSNorm(8, 1e-6), nn.RMSNorm(8, 1e-5)]}, "one eps or no norm, got RMS"),
        ((1, 8, 9, 16), {"biased": True}, "without a relative position bias"),
        ((1, 8, 9, 16), {"rotary": True}, "without rotary positions, got rope=True"),
        ((1, 8, 9, 16), {"registers": 2}, "without registers, got registers=2"),
        ((1, 2**14, 2**14, 16), {}, r"maps below 2\*\*31 values"),
    ],
)
def test_what_the_kernels_do_not_take_is_named_or_left_to_eager_code(
    shape, options, message, backend, monkeypatch
):
    usual = {"dtype": torch.float32, "num_heads": 2, "window": (4, 4), "norms": [nn.Identity()] * 2}
    usual |= {"biased": False, "rotary": False, "registers": 0}
    ask = kernels.attention_obstacle
    monkeypatch.setattr("iwin_core.kernels.dispatch.device_runs_kernels", lambda kind, index: True)
    gpu, taken, refused = torch.device("cuda", 0), (1, 8, 9, 16), (shape, *(usual | options).values())
    monkeypatch.setattr("iwin_core.kernels.dispatch.PASSED_ON_GPU", False)
    assert not kernels.kernels_chosen(gpu, ask, taken, *usual.values())
    assert kernels.kernels_wait()
    monkeypatch.setattr("iwin_core.kernels.dispatch.PASSED_ON_GPU", True)
    assert not kernels.kernels_wait()
    assert kernels.kernels_chosen(gpu, ask, taken, *usual.values())
    assert not kernels.kernels_chosen(gpu, ask, *refused)
    assert not kernels.kernels_chosen(torch.device("cpu"), ask, taken, *usual.values())
    backend("triton")
    with pytest.raises(ValueError, match=f"kernel backend 'triton' takes .*{message}"):
        kernels.kernels_chosen(gpu, ask, *refused)


def test_large_depthwise_kernels_and_other_ranks_are_left_to_eager_code():
    assert kernels.conv_obstacle((1, 8, 9, 16), torch.bfloat16, (7, 7)) is None
    assert "up to 7, got kernel=(9, 9)" in kernels.conv_obstacle((1, 8, 9, 16), torch.float32, (9, 9))
    assert "got rank=3" in kernels.conv_obstacle((1, 4, 8, 9, 16), torch.float32, (3, 3, 3))
    assert "got dtype=torch.float64" in kernels.conv_obstacle((1, 8, 9, 16), torch.float64, (3, 3))


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="kernel backend must be one of auto, eager, triton, got 'cuda'"):
        checked("cuda")


def test_iwin_core_runs_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, iwin_core; "
        "print(iwin_core.IwinAttention(16, 2, 4)(torch.ones(1, 7, 9, 16)).shape)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "torch.Size([1, 7, 9, 16])"


def test_the_compiler_takes_the_choice_of_kernels_for_a_constant():
    marks = vars(torch.compiler.assume_constant_result(lambda: None))
    assert vars(device_runs_kernels) == marks != {}
