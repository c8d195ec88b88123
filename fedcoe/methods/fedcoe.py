"""FedCoE: federated coordinated dual-level mixtures of experts (arXiv 2605.21264, our reading).

Server: M global experts, one gate, the correlation c[k,m] of clients with experts. Client: a
personal expert. A new client is served from the pool with no training.

    each round, for the cohort:
        dispatch        K experts a client: max sum log c under equal capacity
        local train     each expert on its responsibility-weighted balanced-softmax loss,
                        the personal expert on plain cross-entropy
        aggregate       theta_m += eta * momentum of sum_k a[k,m] (theta_km - theta_m)
    when due, with the new experts frozen:
        gate update     targets q_m(x) ~ exp(-loss of expert m / T); closed form or gradient
        correlation     c[k] ~ exp(-s * mean loss), with momentum and a floor

Communicated, a round: K experts down and up. A gate update: M experts down; up the sums F'F, F'Q,
F'Y (analytic) or the gate's parameters (neural), and M mean losses. Label counts once, unless
`similarity` is not `labels` and neither `balanced_softmax` nor `reweighting` is on.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.special import log_softmax

from fedcoe import correlation, neural_gate, prediction
from fedcoe.analytic import Statistics, design_matrix, message_bytes, projections, ridge
from fedcoe.engine.pool import ClientSide
from fedcoe.engine.trainer import Fit, Trainer
from fedcoe.exact_sum import ExactSum
from fedcoe.methods.base import LocalResult, Method, Order, Scores
from fedcoe.methods.settings import MethodSettings
from fedcoe.models import build_expert
from fedcoe.models.flat import Vector
from fedcoe.prediction import Log
from fedcoe.state import ServerState
from fedcoe.streams import stream

SHARED_INPUTS = 256
SKETCH = 64


class FedCoESettings(MethodSettings):
    name: Literal["fedcoe"] = "fedcoe"
    balanced_softmax: bool = True
    server_momentum: float = Field(0.7, ge=0.0, lt=1.0)
    reweighting: bool = True
    experts: int = Field(4, ge=1, le=64, description="M, global experts")
    experts_per_client: int = Field(1, ge=1, le=64, description="K, experts a client trains")
    similarity: Literal["labels", "updates", "none"] = Field(
        "labels",
        description="What seeds the correlation: label counts, or first-round updates where "
        "counts must stay private, or nothing",
    )
    similarity_sharpness: float = Field(4.0, ge=0.0, le=100.0)
    correlation_momentum: float = Field(0.5, ge=0.0, lt=1.0)
    correlation_floor: float = Field(0.05, gt=0.0, le=1.0, description="e in (1-e) c + e/M")
    loss_sharpness: float = Field(5.0, ge=0.0, le=100.0, description="s in c ~ exp(-s loss)")
    responsibility: Literal["none", "posterior"] = Field(
        "posterior", description="Samples' weights for a client's K experts (K = 1: all ones)"
    )
    gate: Literal["analytic", "neural"] = "analytic"
    gate_every: int = Field(
        0, ge=0, description="Also update the gate each this many rounds; 0 = when evaluating"
    )
    gate_temperature: float = Field(0.3, gt=0.0, le=100.0, description="T of the gate's targets")
    gate_features: int = Field(
        0, ge=0, description="Project each expert's features to this many; 0 = keep all"
    )
    ridge: float = Field(1e-3, gt=0.0, le=100.0)
    gate_epochs: int = Field(1, ge=1, le=100, description="Local epochs of the neural gate")
    gate_lr: float = Field(0.1, gt=0.0, le=10.0)
    load_balance: float = Field(0.1, ge=0.0, le=100.0, description="Neural gate's balance term")
    coordination_head: bool = Field(True, description="Global classifier on all features")
    personal_expert: bool = True
    personal_pull: float = Field(
        0.0, ge=0.0, le=100.0, description="Proximal pull to the client's mixture of experts"
    )

    @model_validator(mode="after")
    def _possible(self) -> "FedCoESettings":
        if self.experts_per_client > self.experts:
            raise ValueError(
                f"experts_per_client = {self.experts_per_client}: at most experts = {self.experts}"
            )
        if self.coordination_head and self.gate != "analytic":
            raise ValueError(
                "coordination_head needs gate: analytic (it shares its statistics); "
                "set coordination_head: false"
            )
        return self


@dataclass
class GateMessage:
    """What one shard sends in a gate update."""

    statistics: Statistics | None
    parameters: ExactSum
    """Neural gate: sum of n_k * phi_k."""
    samples: int = 0
    losses: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    """Client to [M] mean loss under each expert."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Clients left out, by reason."""
    shared: ExactSum = field(default_factory=lambda: ExactSum.zeros((SHARED_INPUTS, 1)))
    """[inputs, M] sum of clients' own gates on shared inputs, for the inconsistency."""
    entropies: dict[int, float] = field(default_factory=dict)
    """Client to the mean entropy of its own gate on the shared inputs."""

    def merge(self, other: "GateMessage") -> None:
        if self.statistics is not None and other.statistics is not None:
            self.statistics.merge(other.statistics)
        self.parameters.merge(other.parameters)
        self.samples += other.samples
        self.losses |= other.losses
        self.dropped += other.dropped
        self.shared.merge(other.shared)
        self.entropies |= other.entropies


class FedCoE(Method):
    Settings = FedCoESettings
    has_gate = True
    settings: FedCoESettings

    @property
    def experts(self) -> int:
        return self.settings.experts

    # ---------------------------------------------------------------- server

    def init(self) -> ServerState:
        state = super().init()
        s, f = self.settings, self.federation
        if s.gate == "neural":
            state = state.with_extra(gate=neural_gate.initial(f.shape, self.experts, self._seed))
        if s.similarity == "labels" and self.experts > 1:
            points = correlation.hellinger(f.label_counts)
            state = replace(state, correlation=self._similar(points))
        return state

    @property
    def _seed(self) -> int:
        return self.federation.settings.train.seed

    def _similar(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        s = self.settings
        rng = stream(self._seed, "similarity")
        c = correlation.from_similarity(points, self.experts, s.similarity_sharpness, rng)
        return correlation.normalise(c, s.correlation_floor)

    def dispatch(self, state: ServerState, cohort: Sequence[int]) -> list[Order]:
        rng = stream(self._seed, "dispatch", state.round + 1)
        chosen = correlation.dispatch(
            state.correlation[list(cohort)], self.settings.experts_per_client, rng
        )
        return self.orders(state, cohort, chosen)

    def aggregate(
        self, state: ServerState, orders: Sequence[Order], results: Sequence[LocalResult]
    ) -> ServerState:
        after = super().aggregate(state, orders, results)
        sketches = {k: v for result in results for k, v in result.sketches.items()}
        if sketches:
            clients = sorted(sketches)
            c = after.correlation.copy()
            c[clients] = self._similar(np.stack([sketches[k] for k in clients]))
            after = replace(after, correlation=c)
        return after

    def gate_update(self, state: ServerState, messages: Sequence[GateMessage]) -> ServerState:
        s = self.settings
        total, *others = messages
        for other in others:
            total.merge(other)
        dropped = float(sum(total.dropped.values()))
        if not total.losses:
            return replace(state, diagnostics={"gate_messages_dropped": dropped})
        if total.statistics is not None:
            weights = total.statistics.solve(s.ridge).astype(np.float32)
            state = state.with_extra(gate=weights[:, : self.experts])
            if s.coordination_head:
                state = state.with_extra(head=weights[:, self.experts :])
        else:
            gate = total.parameters.value() / total.samples
            state = state.with_extra(gate=gate.astype(np.float32))
        clients = sorted(total.losses)
        losses = np.stack([total.losses[k] for k in clients])
        c = state.correlation.copy()
        c[clients] = correlation.normalise(
            s.correlation_momentum * c[clients]
            + (1 - s.correlation_momentum) * correlation.from_losses(losses, s.loss_sharpness),
            s.correlation_floor,
        )
        mean = total.shared.value() / len(clients)
        inconsistency = _entropy(mean) - sum(total.entropies[k] for k in clients) / len(clients)
        diagnostics = {"gating_inconsistency": inconsistency, "gate_messages_dropped": dropped}
        return replace(state, correlation=c, diagnostics=diagnostics)

    # --------------------------------------------------------------- clients

    def fits(self, side: ClientSide, state: ServerState, order: Order) -> list[Fit]:
        s, client = self.settings, order.client
        fits = super().fits(side, state, order)
        if s.responsibility == "posterior" and len(order.experts) > 1:
            r = self._responsibilities(side, state, order)
            fits = [replace(fit, sample_weights=r[:, i]) for i, fit in enumerate(fits)]
        if s.personal_expert:
            c = state.correlation[client]
            last = int(state.personal_round[client])
            start: Vector = (
                side.personal.load(client, last) if last else state.experts[int(c.argmax())]
            )
            anchor = (c @ state.experts).astype(np.float32) if s.personal_pull else None
            fits.append(Fit(client, -1, start, anchor=anchor, pull=s.personal_pull))
        return fits

    def _responsibilities(
        self, side: ClientSide, state: ServerState, order: Order
    ) -> NDArray[np.float32]:
        """r[x, i] ~ c[k, m_i] exp(-loss / T) over the K experts a client was given."""
        images, labels = side.data.train(order.client)
        outputs = (
            side.trainer.outputs(state.experts[m], images, self.batch_size) for m in order.experts
        )
        logits = np.stack([logits for logits, _ in outputs])
        log_c = np.log(state.correlation[order.client, list(order.experts)])
        scaled = log_c - sample_losses(logits, labels) / self.settings.gate_temperature
        return np.asarray(np.exp(log_softmax(scaled, axis=1)), np.float32)

    def note(
        self,
        side: ClientSide,
        state: ServerState,
        result: LocalResult,
        fit: Fit,
        delta: Vector,
    ) -> None:
        # Only in round 1 are all experts equal, so that updates of different experts compare.
        if self.settings.similarity == "updates" and state.round == 0 and self.experts > 1:
            head = delta[-side.trainer.head_parameters :].astype(np.float64)
            draws = stream(self._seed, "sketch").standard_normal((len(head), SKETCH))
            sketch = head @ draws
            result.sketches[fit.client] = sketch / max(float(np.linalg.norm(sketch)), 1e-12)

    def gate_message(
        self, side: ClientSide, state: ServerState, clients: Sequence[int]
    ) -> GateMessage:
        s, trainer = self.settings, side.trainer
        shared = side.data.dataset.x_test[:SHARED_INPUTS]
        shared_design = self._forward(trainer, state, shared)[1]
        message = GateMessage(None, ExactSum.zeros(0))
        message.shared = ExactSum.zeros((len(shared), self.experts))
        if s.gate == "analytic":
            message.statistics = Statistics.zeros(shared_design.shape[1], self._targets)
        else:
            # Weighted by n_k: a coarser grid, for larger sums.
            message.parameters = ExactSum.zeros(state.extra["gate"].shape, bits=30)
        for client in clients:
            images, labels = side.data.train(client)
            logits, design = self._forward(trainer, state, images)
            losses = sample_losses(logits, labels)
            q = np.exp(log_softmax(-losses / s.gate_temperature, axis=1))
            if not np.all(np.isfinite(losses)) or not np.all(np.isfinite(design)):
                message.dropped["not finite"] += 1
                continue
            if message.statistics is not None:
                y = np.eye(self.federation.classes)[labels]
                targets = np.concatenate([q, y], axis=1)[:, : self._targets]
                mine = Statistics.zeros(design.shape[1], self._targets)
                mine.add(design, targets)
                message.statistics.merge(mine)
                # The client's own gate, for the inconsistency: of few samples through their
                # kernel, of many from the sums at hand.
                if len(design) < design.shape[1]:
                    gate = ridge(design, q, s.ridge)
                else:
                    gate = mine.solve(s.ridge)[:, : self.experts]
                own: NDArray[np.floating] = shared_design @ gate
            else:
                trained = neural_gate.fit(
                    trainer,
                    state.extra["gate"],
                    images,
                    q,
                    neural_gate.Work(s.gate_epochs, s.gate_lr, s.load_balance),
                    stream(self._seed, "gate", state.round, client),
                )
                if not np.all(np.isfinite(trained)):
                    message.dropped["not finite"] += 1
                    continue
                message.parameters.add(trained, len(labels))
                own = neural_gate.scores(trainer, trained, self.experts, shared, self.batch_size)
            local = np.exp(prediction.log_posterior(own, self._sharpness))
            message.shared.add(local)
            message.entropies[client] = _entropy(local)
            message.samples += len(labels)
            message.losses[client] = losses.mean(axis=0)
        return message

    @property
    def _targets(self) -> int:
        """Columns of F'[Q | Y]; Y only where there is a coordination head."""
        return self.experts + self.federation.classes * self.settings.coordination_head

    def _forward(
        self, trainer: Trainer, state: ServerState, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """[M, n, C] logits and [n, D] design matrix; without an analytic gate D = 0."""
        analytic = self.settings.gate == "analytic"
        outputs = [trainer.outputs(v, images, self.batch_size, analytic) for v in state.experts]
        logits = np.stack([logit for logit, _ in outputs])
        features = [f for _, f in outputs if f is not None]
        if not analytic:
            return logits, np.zeros((len(images), 0))
        width = features[0].shape[1]
        projection = projections(self.experts, width, self.settings.gate_features, self._seed)
        return logits, design_matrix(features, projection)

    def _gate(
        self,
        trainer: Trainer,
        state: ServerState,
        images: NDArray[np.uint8],
        design: NDArray[np.float64],
    ) -> NDArray[np.float32] | None:
        """[n, M] gate scores, or None before the first gate update."""
        if "gate" not in state.extra:
            return None
        if self.settings.gate == "analytic":
            return np.asarray(design @ state.extra["gate"], np.float32)
        gate = state.extra["gate"]
        return neural_gate.scores(trainer, gate, self.experts, images, self.batch_size)

    # ------------------------------------------------------------ prediction

    def score(self, trainer: Trainer, state: ServerState, images: NDArray[np.uint8]) -> Scores:
        logits, design = self._forward(trainer, state, images)
        head = None
        if self.settings.coordination_head and "head" in state.extra:
            head = np.asarray(design @ state.extra["head"], np.float32)
        return Scores(logits, self._gate(trainer, state, images, design), head)

    def log_gate(self, state: ServerState, scores: Scores) -> Log:
        if scores.gate is None:
            return super().log_gate(state, scores)
        # Ridge scores are no probabilities until calibrated.
        sharpness = state.calibration.get("global.gate", self._sharpness)
        return prediction.log_posterior(scores.gate, sharpness)

    @property
    def _sharpness(self) -> float:
        """Of the gate before calibration."""
        return 10.0 if self.settings.gate == "analytic" else 1.0

    def _mean_gate(self, state: ServerState, scores: Scores) -> NDArray[np.float64]:
        """[M] mean of the gate over a client's inputs."""
        return np.asarray(np.exp(self.log_gate(state, scores)).mean(axis=0))

    def _balanced(
        self,
        calibration: Mapping[str, float],
        scores: Scores,
        correlation: NDArray[np.float64] | None = None,
    ) -> Log:
        """[n, C] log probabilities under a uniform label prior.

        Mixture of experts by the gate (and the client's correlation), pooled with the head.
        """
        uniform = np.full(self.federation.classes, 1.0 / self.federation.classes)
        experts = prediction.log_posterior(scores.experts, calibration["experts"])
        experts = prediction.reweight(experts, uniform, self.trained_prior)
        weights = np.zeros(self.experts)
        if correlation is not None:
            weights = weights + calibration["correlation"] * np.log(correlation)
        if scores.gate is not None:
            weights = weights + calibration["gate"] * scores.gate
        log_p = prediction.mixture(experts, log_softmax(weights, axis=-1))
        if scores.head is None:
            return log_p
        head = prediction.log_posterior(scores.head, calibration["head_sharpness"])
        head = prediction.reweight(head, uniform, self.federation.label_prior)
        return prediction.interpolate(log_p, head, calibration["head"])

    def _calibration(self, state: ServerState, scope: str) -> Mapping[str, float]:
        return {
            name: state.calibration.get(f"{scope}.{name}", start)
            for name, (start, _) in self._grids().items()
        }

    def _grids(self) -> dict[str, tuple[float, tuple[float, ...]]]:
        """What is calibrated: start value and the values tried."""
        sharp = (0.0, 1.0, 3.0, 10.0, 30.0) if self.settings.gate == "analytic" else (0.0, 1.0, 2.0)
        return {
            "head": (0.5, (0.0, 0.25, 0.5, 0.75, 1.0)),
            "head_sharpness": (8.0, (3.0, 5.0, 8.0, 12.0, 18.0, 27.0)),
            "gate": (sharp[-2], sharp),
            "experts": (1.0, (0.25, 0.4, 0.6, 0.8, 1.0, 1.25)),
            "correlation": (1.0, (0.0, 0.5, 1.0, 2.0)),
        }

    def calibrate(
        self,
        state: ServerState,
        validation: Mapping[int, tuple[Scores, NDArray[np.int64]]],
    ) -> ServerState:
        """Fit temperatures and weights by coordinate search on the validation likelihood.

        Federated form: for each candidate a client sends one number, its summed loss. Twice:
        `global` predicts without, `client` with the client's label prior and correlation.
        """
        f = self.federation
        uniform = np.full(f.classes, 1.0 / f.classes)

        def loss(scope: str) -> Callable[[Mapping[str, float]], float]:
            def total(candidate: Mapping[str, float]) -> float:
                nll = 0.0
                for client, (scores, labels) in validation.items():
                    if scope == "client":
                        prior = prediction.prior_from_counts(f.label_counts[client])
                        c = state.correlation[client]
                        log_p = self._reweighted(candidate, scores, prior, c)
                    else:
                        # Validation has the seen clients' label mix, the prediction none.
                        log_p = self._balanced(candidate, scores)
                        log_p = prediction.reweight(log_p, f.label_prior, uniform)
                    nll -= float(log_p[np.arange(len(labels)), labels].sum())
                return nll

            return total

        fitted: dict[str, float] = {}
        for scope in ("global", "client"):
            grids = {name: values for name, (_, values) in self._grids().items()}
            if scope == "global":
                grids["correlation"] = (1.0,)
            # Not from the last fit: calibrating twice must change nothing.
            start = {name: value for name, (value, _) in self._grids().items()}
            best = prediction.coordinate_search(loss(scope), start, grids)
            fitted |= {f"{scope}.{name}": value for name, value in best.items()}
        return replace(state, calibration=fitted)

    def predict_global(self, state: ServerState, scores: Scores) -> Log:
        return self._balanced(self._calibration(state, "global"), scores)

    def predict_with(
        self,
        state: ServerState,
        scores: Scores,
        prior: NDArray[np.float64] | None,
        correlation: NDArray[np.float64] | None,
    ) -> Log:
        return self._reweighted(self._calibration(state, "client"), scores, prior, correlation)

    def _reweighted(
        self,
        calibration: Mapping[str, float],
        scores: Scores,
        prior: NDArray[np.float64] | None,
        correlation: NDArray[np.float64] | None,
    ) -> Log:
        log_p = self._balanced(calibration, scores, correlation)
        if prior is None or not self.settings.reweighting:
            return log_p
        uniform = np.full(self.federation.classes, 1.0 / self.federation.classes)
        return prediction.reweight(log_p, prior, uniform)

    def correlation_unlabelled(self, state: ServerState, inputs: Scores) -> NDArray[np.float64]:
        mean = self._mean_gate(state, inputs)[None]
        return np.asarray(correlation.normalise(mean, self.settings.correlation_floor)[0])

    def correlation_labelled(
        self, state: ServerState, inputs: Scores, labels: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        losses = sample_losses(inputs.experts, labels).mean(axis=0)
        c = correlation.from_losses(losses[None], self.settings.loss_sharpness)
        return np.asarray(correlation.normalise(c, self.settings.correlation_floor)[0])

    # ------------------------------------------------------------- accounting

    def gate_bytes(self, state: ServerState, clients: int) -> tuple[int, int]:
        experts, parameters = state.experts.shape
        if self.settings.gate == "neural":
            up = 4 * (state.extra["gate"].size + experts)
        else:
            f = self.federation
            width = build_expert(f.settings.model.name, f.shape, f.classes, 0).head.in_features
            kept = min(self.settings.gate_features or width, width) * experts + 1
            up = message_bytes(kept, self._targets) + 4 * experts
        return clients * up, clients * 4 * experts * parameters


def sample_losses(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """[M, n, C] logits and [n] labels to [n, M] cross-entropies."""
    log_p = prediction.log_posterior(logits)
    return np.asarray(-log_p[:, np.arange(len(labels)), labels].T)


def _entropy(p: NDArray[np.float64]) -> float:
    """Mean entropy of [n, M] distributions, in nats."""
    return float(-(p * np.log(np.maximum(p, 1e-12))).sum(axis=1).mean())
