"""Local: every client trains a model of its own on its own data, and nothing is shared.

The rival that every personalized method must beat (docs/comparison.md: win rate).

    each round, for the cohort:
        local train     v_k from where the client left it; from the common start in its first round

Own models are trained on plain cross-entropy, as personal experts are in all methods: the switch
`balanced_softmax` is inert, and so are those of the server's step and the coordination head.

Communicated: nothing. There is no global model, so the global prediction, and with it every mode
of cold start, is the uniform distribution: its accuracy is that of always naming the first class,
chance on a balanced test set. With `reweighting` and a label prior (mode `labels`) that becomes
the prior itself, the majority class. The row `few_shot` is what Local means for a new client. A
seen client that no cohort has included yet has no model and is predicted uniformly too.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedcoe.engine.pool import ClientSide
from fedcoe.engine.trainer import Fit, Trainer
from fedcoe.methods.base import LocalResult, Method, Order, Scores
from fedcoe.methods.settings import MethodSettings
from fedcoe.state import ServerState


class LocalSettings(MethodSettings):
    name: Literal["local"] = "local"


class Local(Method):
    """The one expert of the state stays at the common start; each order is one own model."""

    Settings = LocalSettings
    has_global = False
    own_model_alone = True
    sends_updates = False
    shares = (1.0,)

    def fits(self, side: ClientSide, state: ServerState, order: Order) -> list[Fit]:
        return [Fit(order.client, -1, self.personal_start(side, state, order.client))]

    def local_train(
        self, side: ClientSide, state: ServerState, orders: Sequence[Order]
    ) -> LocalResult:
        result = LocalResult.zeros(*state.experts.shape)
        fits = (fit for order in orders for fit in self.fits(side, state, order))
        for fit, trained in side.trainer.fit(fits, self.work(state.round + 1), side.data):
            result.images += trained.images
            if not np.all(np.isfinite(trained.vector)):
                result.dropped["not finite"] += 1
                continue
            side.personal.save(fit.client, state.round + 1, trained.vector)
            result.personal.append(fit.client)
            result.valid += 1
            result.losses.append(trained.loss * trained.images)
            result.samples += trained.images
        return result

    def score(self, trainer: Trainer, state: ServerState, images: NDArray[np.uint8]) -> Scores:
        """Nothing is run: equal logits are the uniform prediction."""
        return Scores(np.zeros((1, len(images), self.federation.classes), np.float32))

    def inert(self) -> list[str]:
        on = [
            name
            for name in ("balanced_softmax", "server_momentum", "coordination_head", "blend")
            if getattr(self.settings, name)
        ]
        if self.settings.robust != "none":
            on.append("robust")
        found = [f"{name}: Local shares no model that it could change" for name in on]
        return found + self.inert_faults()

    @property
    def coordinates(self) -> bool:
        return False

    @property
    def trained_prior(self) -> NDArray[np.float64]:
        return np.full(self.federation.classes, 1.0 / self.federation.classes)

    def round_bytes(self, state: ServerState, orders: Sequence[Order]) -> tuple[int, int]:
        return 0, 0
