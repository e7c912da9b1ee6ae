import pytest
import torch

from iwin_core import IwinTransformer

SIZES = [(32, 48), (30, 43)]  # one that divides, one that is padded at every step


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    options = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 10, "window_size": 4}
    return IwinTransformer(img_size=(32, 48), **options).eval()


@pytest.mark.parametrize("size", SIZES)
def test_the_whole_model_compiles_as_one_graph(model, size):
    torch.compiler.reset()  # else it compiles for any size, which takes half a minute
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
def test_a_compiled_model_takes_further_sizes(model):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in [*SIZES, (40, 50), (7, 9)]:
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
def test_inductor_gives_the_same_logits(model):
    torch.compiler.reset()
    x = torch.randn(2, 3, 30, 43)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize("size", SIZES)
def test_exported_programs_take_any_batch(model, size):
    batch = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (torch.randn(2, 3, *size),), dynamic_shapes=batch)
    for count in (1, 3):
        x = torch.randn(count, 3, *size)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("size", SIZES)
def test_onnx_runtime_gives_the_same_logits_at_any_batch(model, size, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    batch = {"x": {0: torch.export.Dim("batch")}}
    example = (torch.randn(2, 3, *size),)
    path = tmp_path / "iwin.onnx"
    torch.onnx.export(model, example, path, dynamo=True, dynamic_shapes=batch, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for count in (1, 3):
        x = torch.randn(count, 3, *size)
        (logits,) = session.run(None, {"x": x.numpy()})
        assert (torch.from_numpy(logits) - model(x)).abs().max() < 1e-3
