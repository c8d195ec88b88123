import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcoe import __version__
from fedcoe.bundle import export_models, load_bundle
from fedcoe.errors import FedCoEError
from fedcoe.export import ABOUT, TOLERANCE, Mixture, export_pt2

# Every part of the mixture has a say, and none all of it.
CALIBRATION = {
    "global.experts": 0.6,
    "global.gate": 3.0,
    "global.head": 0.4,
    "global.head_sharpness": 5.0,
}
KINDS = {
    "analytic gate and head": {},
    "all features": {"gate_features": 0},
    "no head": {"coordination_head": False},
    "uniform gate": {"gate": "uniform"},
    "patch features": {"patch_filters": 3},
    "balanced head": {"balanced_head": True},
    "fedavg": {"name": "fedavg"},
    "fedavg with a head": {"name": "fedavg", "coordination_head": True},
}


@pytest.fixture
def bundle_of(make_method, engine, train, tmp_path):
    def make(**method):
        made = make_method(**method)
        state = replace(train(engine, made, 2), calibration=CALIBRATION)
        side = engine.run(lambda side: side)
        export_models(tmp_path / "models", made, state, side.personal)
        return load_bundle(tmp_path / "models", "fp32"), np.array(side.data.dataset.x_test)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_computes_what_the_mixture_does_for_any_number_of_images(
    bundle_of, tmp_path, kind
):
    bundle, images = bundle_of(**KINDS[kind])
    assert export_pt2(bundle, tmp_path / "m.pt2") < 1e-4
    program = torch.export.load(tmp_path / "m.pt2").module()
    for some in (images, images[:1], images[:7]):
        found = program(torch.tensor(some)).numpy()
        np.testing.assert_allclose(found, np.exp(bundle.predict(some)), atol=1e-4)


def test_one_expert_is_exported_alone_with_what_it_is(bundle_of, tmp_path):
    bundle, images = bundle_of()
    export_pt2(bundle, tmp_path / "e.pt2", 1)
    extra = {ABOUT: ""}
    program = torch.export.load(tmp_path / "e.pt2", extra_files=extra).module()
    found = program(torch.tensor(images)).numpy()
    logits = torch.tensor(bundle.score(images).experts[1])
    np.testing.assert_allclose(found, logits.softmax(-1).numpy(), atol=1e-5)
    about = json.loads(extra[ABOUT])
    assert about["what"] == "expert 1"
    assert about["classes"] == list("abcd")
    assert about["image"] == ["uint8", "n", 8, 8, 1]
    assert (about["round"], about["fedcoe"]) == (2, __version__)


def test_a_file_that_computes_something_else_is_not_kept(bundle_of, tmp_path, monkeypatch):
    bundle, _ = bundle_of()
    right = Mixture._design
    monkeypatch.setattr(
        Mixture, "_design", lambda self, parts, fixed: right(self, parts[::-1], fixed)
    )
    with pytest.raises(FedCoEError, match=f"at most {TOLERANCE:g}.*nothing was kept"):
        export_pt2(bundle, tmp_path / "m.pt2")
    assert not (tmp_path / "m.pt2").exists()


def test_what_cannot_be_exported_is_said(bundle_of, tmp_path):
    bundle, _ = bundle_of(gate="neural", coordination_head=False)
    with pytest.raises(FedCoEError, match="neural gate"):
        export_pt2(bundle, tmp_path / "m.pt2")
    with pytest.raises(FedCoEError, match="no expert 2: there are 0 to 1"):
        export_pt2(bundle, tmp_path / "m.pt2", 2)
    assert export_pt2(bundle, tmp_path / "e.pt2", 0) < 1e-5
