"""Is a run on letters scored against drawings of its own size and ground, without being told?"""

import pytest

from flashdit.config import load
from flashdit.evaluation.evaluate import evaluate
from flashdit.evaluation.features.ranks import Ranks
from flashdit.evaluation.request import EvaluationRequest, open_plan
from flashdit.glyphs import dataset
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.options import SamplingOptions
from flashdit.trainer import Trainer

TINY = [
    "training.steps=2",
    "training.global_batch_size=2",
    "training.preview_every=0",
    "model.depth=1",
    "model.hidden_size=16",
    "model.num_heads=1",
    "data.image_size=32",
    "data.num_images=52",
]
LATENTS = ["latents.space=vae", "latents.vae=glyphs", "model.patch_size=2", "flow.prediction=velocity"]


@pytest.mark.parametrize(
    ("overrides", "reference"),
    [
        (["data.ground=photograph"], "{name: glyphs, image_size: 32, ground: photograph, num_images: 52}"),
        (LATENTS, "{name: glyphs, image_size: 32, num_images: 52}"),
    ],
    ids=["pixels", "latents"],
)
def test_a_run_is_scored_against_drawings_like_its_own(tmp_path, monkeypatch, overrides, reference):
    monkeypatch.setattr(dataset, "COMPARED", 104)
    Trainer(load("glyphs", [*TINY, *overrides, f"run.dir={tmp_path / 'run'}"])).fit()
    generator = load_generator(tmp_path / "run")
    request = EvaluationRequest(
        generator=generator, sampling=SamplingOptions(steps=1), data=generator.data_spec, cache=False
    )
    plan = open_plan(request, ranks=Ranks())
    assert (plan.samples.count, plan.reference.spec, plan.extractor.name) == (104, reference, "glyphs")
    assert plan.samples.labels.bincount().tolist() == [4] * 26
    result = evaluate(plan)
    floor = result.floor.values
    assert floor["accuracy"] > 0.95
    assert 10 * floor["fid"] < result.scores.values["fid"]
