"""A pick for a device: one expert or the whole mixture as one file that needs no FedCoE to run.

The program takes uint8 images [n, H, W, C], any n, and gives class probabilities [n, C]: scaling
of pixels, calibration and pooling are in it. It computes in float32, and is compared with the
model it was made of after it has been written and read back.
"""

import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedcoe import __version__
from fedcoe.analytic import projections
from fedcoe.bundle import Bundle, layout_of
from fedcoe.errors import FedCoEError
from fedcoe.models import Expert
from fedcoe.models.flat import to_tensors
from fedcoe.prediction import log_posterior
from fedcoe.streams import stream

TOLERANCE = 1e-3
"""Largest difference of a probability that is let pass; float32 sums differ by about 1e-6."""
ABOUT = "fedcoe.json"
"""Name of the file inside the .pt2 that says what it is: classes, image shape, what was picked."""


class Program(nn.Module):
    """Experts' outputs for uint8 images; what is made of them is up to subclasses."""

    scale: Tensor
    shift: Tensor

    def __init__(self, bundle: Bundle, experts: list[int]) -> None:
        super().__init__()
        method, f = bundle.method, bundle.method.federation
        self.experts = nn.ModuleList()
        layout = layout_of(method)
        for m in experts:
            module = method.build(f.settings.model.name, f.shape, f.classes, 0)
            tensors = to_tensors(bundle.state.experts[m], layout)
            module.load_state_dict({name: torch.tensor(v) for name, v in tensors.items()})
            self.experts.append(module)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (f.mean, f.std))
        self.register_buffer("scale", 1.0 / (255.0 * std))
        self.register_buffer("shift", -mean / std)

    def outputs(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each expert's logits [n, C] and features [n, D]."""
        x = torch.addcmul(self.shift, images.permute(0, 3, 1, 2).float(), self.scale)
        hidden = [cast(Expert, expert).features(x) for expert in self.experts]
        return [(cast(Expert, e).head(h), h) for e, h in zip(self.experts, hidden, strict=True)]


class OneExpert(Program):
    def forward(self, images: Tensor) -> Tensor:
        return F.softmax(self.outputs(images)[0][0], dim=-1)


class Mixture(Program):
    """`Bundle.predict` in mode `none`, for methods without a gate or with an analytic one."""

    gate: Tensor | None
    head: Tensor | None
    projection: Tensor | None
    experts_prior: Tensor
    head_prior: Tensor

    def __init__(self, bundle: Bundle) -> None:
        method, state = bundle.method, bundle.state
        super().__init__(bundle, list(range(method.experts)))
        self.coordinates = method.coordinates
        self.calibration = dict(method.calibration(state, "global"))
        f = method.federation

        def keep(name: str, array: NDArray[np.floating] | None) -> None:
            if array is None:
                setattr(self, name, None)  # torch.export miscounts buffers that are None
            else:
                self.register_buffer(name, torch.tensor(np.asarray(array), dtype=torch.float32))

        keep("gate", state.extra.get("gate"))
        keep("head", state.extra.get("head") if method.settings.coordination_head else None)
        width = cast(Expert, self.experts[0]).head.in_features
        seed = f.settings.train.seed
        keep("projection", projections(method.experts, width, method.gate_features, seed))
        self.patches = method.patches
        keep("experts_prior", np.log(method.trained_prior) - np.log(method.pooled_prior))
        keep("head_prior", np.log(method.head_prior) - np.log(method.pooled_prior))

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.outputs(images)
        logits = torch.stack([logit for logit, _ in outputs])
        if not self.coordinates:
            return F.softmax(logits, dim=-1).mean(dim=0)
        c = self.calibration
        experts = F.log_softmax(logits * c.get("experts", 1.0), dim=-1)
        experts = F.log_softmax(experts - self.experts_prior, dim=-1)
        fixed = [] if self.patches is None else [self.patches(images)]
        design = self._design([h for _, h in outputs], fixed)
        if self.gate is None:
            weights = logits.new_zeros(logits.shape[:2])
        else:
            weights = (design @ self.gate).T * c["gate"]
        log_p = torch.logsumexp(experts + F.log_softmax(weights, dim=0)[..., None], dim=0)
        if self.head is not None:
            head = F.log_softmax(design @ self.head * c["head_sharpness"], dim=-1)
            head = F.log_softmax(head - self.head_prior, dim=-1)
            log_p = F.log_softmax((1.0 - c["head"]) * log_p + c["head"] * head, dim=-1)
        return log_p.exp()

    def _design(self, features: list[Tensor], fixed: list[Tensor]) -> Tensor:
        parts = []
        for m, part in enumerate(features):
            part = part / torch.linalg.vector_norm(part, dim=1, keepdim=True).clamp_min(1e-6)
            parts.append(part if self.projection is None else part @ self.projection[m])
        joined = torch.cat(parts, dim=1) / math.sqrt(len(features))
        return torch.cat([joined, *fixed, torch.ones_like(joined[:, :1])], dim=1)


def export_pt2(bundle: Bundle, path: Path, expert: int | None = None) -> float:
    """Write one expert, or the mixture, as a `torch.export` program.

    Args:
        bundle: opened in fp32.
        path: ends in .pt2. The extra file `fedcoe.json` in it says classes, image, settings,
            version and round.
        expert: which; None = the mixture.

    Returns:
        Largest difference of a probability between the file, read back, and the bundle.

    Raises:
        FedCoEError: there is no such expert, the method's mixture cannot be expressed, or the
            file does not compute what the model does (it is removed then).
    """
    program = _program(bundle, expert).train(False).requires_grad_(False)
    path = Path(path)
    f = bundle.method.federation
    images = stream(0, "export check").integers(0, 256, (5, *f.shape), np.uint8)
    about = {
        "what": "mixture" if expert is None else f"expert {expert}",
        "classes": f.class_names,
        "image": ["uint8", "n", *f.shape],
        "fedcoe": __version__,
        "round": bundle.state.round,
        "settings": f.settings.model_dump(mode="json", exclude={"runtime"}),
    }
    with torch.no_grad():
        batch = torch.export.Dim("n", min=1)
        exported = torch.export.export(
            program, (torch.tensor(images),), dynamic_shapes=({0: batch},)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    extra: dict[str, Any] = {ABOUT: json.dumps(about)}
    torch.export.save(exported, path, extra_files=extra)
    difference = _difference(bundle, path, expert, images)
    if not difference <= TOLERANCE:
        path.unlink()
        raise FedCoEError(
            f"the exported program's probabilities differ by {difference:.2g} from the model's "
            f"(at most {TOLERANCE:g} is let pass); nothing was kept"
        )
    return difference


def _program(bundle: Bundle, expert: int | None) -> Program:
    name = bundle.method.federation.settings.method.name
    if expert is not None:
        if not 0 <= expert < bundle.method.experts:
            raise FedCoEError(f"no expert {expert}: there are 0 to {bundle.method.experts - 1}")
        return OneExpert(bundle, [expert])
    bundle.check_whole()
    gate = bundle.state.extra.get("gate")
    if gate is not None and gate.ndim != 2:
        raise FedCoEError(f"{name} with a neural gate: only its experts can be exported (--expert)")
    return Mixture(bundle)


def _difference(bundle: Bundle, path: Path, expert: int | None, images: NDArray[np.uint8]) -> float:
    program = torch.export.load(path).module()
    worst = 0.0
    # Another number of images than it was traced with, too.
    for some in (images, images[:1]):
        found = program(torch.tensor(some)).numpy()
        if expert is None:
            expected = np.exp(bundle.predict(some))
        else:
            expected = np.exp(log_posterior(bundle.score(some).experts[expert]))
        worst = max(worst, float(np.abs(found - expected).max()))
    return worst if np.isfinite(worst) else math.inf
