"""FedPer (Arivazhagan et al. 2019, arXiv 1912.00818): a common body, a head of one's own.

    each round, for the cohort, from the received body and the client's own head:
        local train     both together
        aggregate       bodies, weighted by n_k; heads stay

Personalized prediction: the averaged body under the client's head. The paper has no model for a
client without a head: new clients, and the global prediction, get the mean of all seen clients'
heads as they are now, weighted by n_k (the head everyone starts with, where no cohort has included
a client yet). It is averaged for that alone and not counted as communicated.

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
from fedcoe.exact_sum import ExactSum, addable
from fedcoe.methods.base import LocalResult, Method, Order, merged
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

    def note(
        self,
        side: ClientSide,
        state: ServerState,
        result: LocalResult,
        fit: Fit,
        delta: Vector,
    ) -> None:
        """What a client's own parts add to the mean of everybody's."""
        kept = side.personal.load(fit.client, state.round + 1)
        change = self.own_of(kept) - self.own_of(fit.start)
        # A model can have diverged whose update an attacker made up.
        if change.size and addable(change):
            counts = self.federation.train_counts
            total = result.extra.setdefault("own", ExactSum.zeros(change.size))
            total.add(change, float(counts[fit.client] / counts.sum()))

    def own_of(self, vector: Vector) -> Vector:
        """The own parts of a [P] vector, joined."""
        return np.concatenate([vector[:0], *(vector[part] for part in self.own_parts)])

    def aggregate(
        self, state: ServerState, orders: Sequence[Order], results: Sequence[LocalResult]
    ) -> ServerState:
        """Own parts become the mean over all seen clients, which no momentum carries further."""
        total = merged(results)
        after = super().aggregate(state, orders, [total])
        experts, momentum = after.experts.copy(), after.momentum.copy()
        own = self.own_of(state.experts[0])
        if "own" in total.extra:
            own = (own + total.extra["own"].value()).astype(np.float32)
        for part in self.own_parts:
            experts[:, part], own = own[: part.stop - part.start], own[part.stop - part.start :]
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
