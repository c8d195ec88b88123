"""SCAFFOLD (Karimireddy et al., ICML 2020): control variates against client drift.

    each round, for the cohort, from the received w_t and c:
        local train     w_k: SGD with gradients g + c - c_k
        variate         c_k+ = c_k - c + (w_t - w_k) / (lr * steps)        (option II)
        aggregate       w_t+1 = sum_k n_k w_k / sum_k n_k,  c += sum_k n_k (c_k+ - c_k) / n

c_k starts at 0 and stays with its client; n is the sample count of all seen clients. Departures:
the paper weighs clients equally, here samples count as in FedAvg, in w and in c alike, so that c
remains the gradient of what is minimised; with client momentum beta, `steps` is what the momentum
makes of them, sum_j (1 - beta^j) / (1 - beta), as each gradient is applied that many times.

Personalized prediction and new clients: the global model. Communicated: the model and c down, their
updates up, twice FedAvg's bytes. With c and c_k held at 0 it is FedAvg.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import field_validator

from fedcoe.engine.pool import ClientSide
from fedcoe.engine.trainer import Fit
from fedcoe.exact_sum import ExactSum, addable
from fedcoe.methods.base import LocalResult, Method, Order, merged
from fedcoe.methods.settings import MethodSettings
from fedcoe.models.flat import Vector
from fedcoe.state import ServerState


class ScaffoldSettings(MethodSettings):
    name: Literal["scaffold"] = "scaffold"

    @field_validator("robust")
    @classmethod
    def _plain(cls, robust: str) -> str:
        if robust != "none":
            raise ValueError(
                "scaffold averages control variates beside the updates, where attackers would "
                "get through all the same; only none"
            )
        return robust


class Scaffold(Method):
    """What a client keeps on disk is c_k."""

    Settings = ScaffoldSettings
    personal_models = False

    def init(self) -> ServerState:
        state = super().init()
        return state.with_extra(variate=np.zeros_like(state.experts[0]))

    def variate(self, side: ClientSide, state: ServerState, client: int) -> Vector:
        """[P] c_k as the client left it."""
        last = int(state.personal_round[client])
        return side.personal.load(client, last) if last else np.zeros_like(state.experts[0])

    def fits(self, side: ClientSide, state: ServerState, order: Order) -> list[Fit]:
        correction = state.extra["variate"] - self.variate(side, state, order.client)
        return [replace(fit, correction=correction) for fit in super().fits(side, state, order)]

    def note(
        self,
        side: ClientSide,
        state: ServerState,
        result: LocalResult,
        fit: Fit,
        delta: Vector,
    ) -> None:
        assert fit.correction is not None
        work, counts = self.work(state.round + 1), self.federation.train_counts
        steps = effective_steps(work.steps(int(counts[fit.client])), work.momentum)
        old = self.variate(side, state, fit.client)
        # -correction is c_k - c.
        new = -fit.correction - delta / np.float32(work.lr * steps)
        change = new - old
        if not addable(change):
            result.dropped["variate too large"] += 1
            return
        total = result.extra.setdefault("variate", ExactSum.zeros(len(change)))
        total.add(change, float(counts[fit.client] / counts.sum()))
        side.personal.save(fit.client, state.round + 1, new)
        result.personal.append(fit.client)

    def aggregate(
        self, state: ServerState, orders: Sequence[Order], results: Sequence[LocalResult]
    ) -> ServerState:
        total = merged(results)
        after = super().aggregate(state, orders, [total])
        if "variate" not in total.extra:
            return after
        variate = state.extra["variate"] + total.extra["variate"].value()
        return after.with_extra(variate=variate.astype(np.float32))

    def personal_logits(self, *_: object) -> None:
        return None

    def round_bytes(self, state: ServerState, orders: Sequence[Order]) -> tuple[int, int]:
        up, down = super().round_bytes(state, orders)
        return 2 * up, 2 * down


def effective_steps(steps: int, momentum: float) -> float:
    """How often a client's mean gradient is applied in that many steps of heavy-ball SGD."""
    return float(sum((1 - momentum**j) / (1 - momentum) for j in range(1, steps + 1)))
