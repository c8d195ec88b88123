"""Every tensor of training, evaluation and serving is on the device that it has to be on."""

import numpy as np
import pytest
import torch

from fedcoe.engine.trainer import move
from fedcoe.methods.settings import method_names

EXTRAS = {
    "neural gate": {"gate": "neural", "coordination_head": False},
    "branch": {"similarity": "features", "branch_after": 1, "personal_epochs": 1},
    "two experts a client": {"experts_per_client": 2, "patch_filters": 4, "balanced_head": True},
    "updates": {"similarity": "updates", "personal_pull": 0.1, "gate_features": 4},
}


def test_the_pretend_gpu_refuses_what_a_real_one_refuses(gpu, inside):
    with inside:
        here, there = torch.ones(3), torch.ones(3).to(gpu)
        assert str(there.device) == str(torch.tensor([1.0], device=gpu).device) == gpu
        for both in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: here[torch.tensor([1]).to(gpu)],
            lambda: here.index_put_((torch.tensor([1]),), there[:1]),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                both()
        for numpy in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(RuntimeError, match="numpy"):
                numpy()
        there[1:].mul_(2.0)
        assert (there[torch.tensor([1])] + 1.0).cpu().numpy() == [3.0]


def test_images_are_moved_on_a_gpu_as_on_a_processor(gpu, inside):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (64, 8, 10, 3), np.uint8))
    moves = torch.from_numpy(rng.integers(0, (3, 3, 2), (64, 3)))
    expected = move(images, moves)
    with inside:
        assert torch.equal(move(images.to(gpu), moves.to(gpu)).cpu(), expected)


@pytest.mark.parametrize(
    ("vectorized", "settings"),
    [
        *((True, {"name": name}) for name in method_names()),
        *((True, {"name": "fedcoe"} | extra) for extra in EXTRAS.values()),
        *((False, {"name": name}) for name in ("fedcoe", "fedrep", "scaffold", "fedem")),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_a_method_does_on_a_gpu_what_it_does_on_a_processor(
    gpu, make_method, two_rounds, vectorized, settings
):
    method = make_method(**settings)
    found, expected = (two_rounds(method, vectorized, device) for device in (gpu, "cpu"))
    moved = np.abs(expected.state.experts - method.init().experts).max()
    np.testing.assert_allclose(
        found.state.experts, expected.state.experts, rtol=0, atol=1e-3 * moved
    )
    for figures, others in (
        (found.evaluation.overall, expected.evaluation.overall),
        (found.evaluation.personalized, expected.evaluation.personalized),
        *((found.cold_start[mode], expected.cold_start[mode]) for mode in expected.cold_start),
    ):
        assert figures["nll"] == pytest.approx(others["nll"], rel=1e-2)
