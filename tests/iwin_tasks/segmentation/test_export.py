"""A segmenter as an exported program and in ONNX gives the same logits, at any batch."""

import pytest
import torch

from iwin_tasks.segmentation import build_segmenter

BODY = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}
SIZE = (61, 75)
BATCH = {"images": {0: torch.export.Dim("batch")}}


def small(kind):
    torch.manual_seed(0)
    name, options = "iwin_tiny_patch4_window7_224", {"channels": 8, "auxiliary_channels": 4}
    return build_segmenter(kind, name, 5, backbone_options=BODY, **options).eval()


@pytest.mark.parametrize("kind", ["upernet", "semantic_fpn"])
def test_exported_programs_take_any_batch(kind):
    model = small(kind)
    program = torch.export.export(model, (torch.randn(2, 3, *SIZE),), dynamic_shapes=BATCH).module()
    for count in (1, 3):
        x = torch.randn(count, 3, *SIZE)
        torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize("kind", ["upernet", pytest.param("semantic_fpn", marks=pytest.mark.slow)])
def test_onnx_runtime_gives_the_same_logits_at_any_batch(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path, example = small(kind), tmp_path / "segmenter.onnx", (torch.randn(2, 3, *SIZE),)
    torch.onnx.export(model, example, path, dynamo=True, dynamic_shapes=BATCH, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for count in (1, 3):
        x = torch.randn(count, 3, *SIZE)
        (logits,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=0, atol=1e-4)
