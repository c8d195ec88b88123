"""FedPer (Arivazhagan et al. 2019, arXiv 1912.00818): a common body, a head of one's own.

    each round, for the cohort, from the received body and the client's own head:
        local train     both together
        aggregate       bodies, weighted by n_k; heads stay

Personalized prediction: the averaged body under the client's head. The paper has no model for a
client without a head: new clients, and the global prediction, get the mean of the cohort's heads,
which is averaged for that alone and not counted as communicated. A seen client that no cohort has
included yet gets the same.

Communicated: the body, down and up. With the head shared too, it is FedAvg.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedcoe.engine.pool import ClientSide
from fedcoe.engine.trainer import Fit
from fedcoe.methods.base import Method, Order
from fedcoe.methods.settings import MethodSettings
from fedcoe.models.flat import FlatModel, Vector
from fedcoe.state import ServerState


class FedPerSettings(MethodSettings):
    name: Literal["fedper"] = "fedper"


class FedPer(Method):
    """Also the base of methods that keep other parts of a model with the client."""

    Settings: ClassVar[type[MethodSettings]] = FedPerSettings
    own_model_alone = True
    keeps_trained = True
    own: ClassVar[tuple[str, ...]] = ("head.",)
    """How names of the parameters begin that stay with a client."""
    personal_head: ClassVar[str] = "head"
    """What of the module turns features into a client's own logits."""

    @cached_property
    def own_parts(self) -> list[slice]:
        """Where a client's own parameters stand in the flat vector."""
        f = self.federation
        layout = FlatModel(self.build(f.settings.model.name, f.shape, f.classes, 0)).layout
        parts, start = [], 0
        for name, shape in layout.items():
            end = start + int(np.prod(shape))
            if name.startswith(self.own):
                parts.append(slice(start, end))
            start = end
        return parts

    def with_own(self, shared: Vector, own: Vector) -> Vector:
        """[P] the shared parameters of the first, the client's own of the second."""
        joined = shared.copy()
        for part in self.own_parts:
            joined[part] = own[part]
        return joined

    def fits(self, side: ClientSide, state: ServerState, order: Order) -> list[Fit]:
        fits = super().fits(side, state, order)
        own = self.personal_start(side, state, order.client)
        return [replace(fit, start=self.with_own(fit.start, own)) for fit in fits]

    def server_step(self, state: ServerState, update: NDArray[np.float64]) -> ServerState:
        """Own parts are averaged plainly: a mean of heads has nothing to gain from momentum."""
        after = super().server_step(state, update)
        experts, momentum = after.experts.copy(), after.momentum.copy()
        for part in self.own_parts:
            experts[:, part] = state.experts[:, part] + update[:, part]
            momentum[:, part] = 0.0
        return replace(after, experts=experts, momentum=momentum)

    def personal_logits(
        self, side: ClientSide, state: ServerState, client: int, images: NDArray[np.uint8]
    ) -> NDArray[np.float32] | None:
        last = int(state.personal_round[client])
        if not last:
            return None
        vector = self.with_own(state.experts[0], side.personal.load(client, last))
        logits, _ = side.trainer.outputs(vector, images, self.batch_size, head=self.personal_head)
        shift = self.personal_shift(client)
        return logits if shift is None else logits + shift

    def personal_shift(self, client: int) -> NDArray[np.float32] | None:
        """[C] what training added to a client's own logits, and prediction must too."""
        return self.logit_shift(client)

    def round_bytes(self, state: ServerState, orders: Sequence[Order]) -> tuple[int, int]:
        up, down = super().round_bytes(state, orders)
        own = 4 * sum(part.stop - part.start for part in self.own_parts) * len(orders)
        return up - own, down - own
