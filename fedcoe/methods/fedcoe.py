"""FedCoE: federated coordinated dual-level mixtures of experts (arXiv 2605.21264, our reading).

Server: M global experts, one gate, the correlation c[k,m] of clients with experts. Client: a
personal expert. A new client is served from the pool with no training.

    each round, for the cohort; until round `branch_after` with one model in place of M:
        dispatch        K experts a client: max sum log c under equal capacity, or (`top_k`) the K
                        that suit it best
        local train     each expert on its responsibility-weighted balanced-softmax loss
        aggregate       theta_m += eta * momentum of sum_k a[k,m] (theta_km - theta_m)
    before an evaluation (`personal_epochs: 0`: in each round, from its own last weights):
        personal        from the expert that suits the client best, on plain cross-entropy
    when due, with the new experts frozen:
        gate update     targets q_m(x) ~ exp(-loss of expert m / T); closed form or gradient
        correlation     c[k] ~ exp(-s * mean loss), with momentum and a floor

Communicated, a round: K experts down and up. A gate update: M experts down; up the sums F'F, F'Q,
F'Y (analytic) or the gate's parameters (neural), and M mean losses. Label counts once, where
something on the server needs them (docs/privacy.md). With `similarity: features`, once: the mean of
a client's features, and their sums by class.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.special import log_softmax

from fedcoe import correlation, neural_gate, prediction
from fedcoe.analytic import Statistics, message_bytes, ridge
from fedcoe.engine.pool import ClientSide
from fedcoe.engine.trainer import Fit, Trainer
from fedcoe.exact_sum import ExactSum
from fedcoe.methods.base import GateMessage, LocalResult, Method, Order, Scores
from fedcoe.methods.settings import PREDICTION, MethodSettings, described
from fedcoe.models.flat import Vector
from fedcoe.prediction import Log
from fedcoe.privacy import Messages
from fedcoe.state import ServerState
from fedcoe.streams import stream

SHARED_INPUTS = 256
SKETCH = 64


class FedCoESettings(MethodSettings):
    name: Literal["fedcoe"] = "fedcoe"
    balanced_softmax: bool = Field(True, description=described("balanced_softmax"))
    server_momentum: float = Field(0.7, ge=0.0, lt=1.0, description=described("server_momentum"))
    reweighting: bool = Field(True, description=described("reweighting"))
    experts: int = Field(4, ge=1, le=64, description="M, global experts")
    experts_per_client: int = Field(1, ge=1, le=64, description="K, experts a client trains")
    similarity: Literal["labels", "features", "updates", "none"] = Field(
        "labels",
        description="What seeds the correlation: label counts; or how clients' mean features under "
        "the common model, when it branches, differ from what their label counts let expect; or "
        "first-round updates where counts must stay private; or nothing",
    )
    similarity_sharpness: float = Field(
        4.0, ge=0.0, le=100.0, description="How far the first correlation is from even shares"
    )
    correlation_momentum: float = Field(
        0.5, ge=0.0, lt=1.0, description="What a client's correlation keeps when its losses arrive"
    )
    correlation_floor: float = Field(0.05, gt=0.0, le=1.0, description="e in (1-e) c + e/M")
    loss_sharpness: float = Field(5.0, ge=0.0, le=100.0, description="s in c ~ exp(-s loss)")
    responsibility: Literal["none", "posterior"] = Field(
        "posterior", description="Samples' weights for a client's K experts (K = 1: all ones)"
    )
    dispatch: Literal["equal_capacity", "top_k", "random", "label_clusters"] = Field(
        "equal_capacity",
        description="Who trains what: the K most correlated, with equal shares for all experts, or "
        "(top_k) without; for ablation random ones, or fixed clusters of label mixes",
    )
    aggregation: Literal["correlation", "uniform"] = Field(
        "correlation", description="Whether correlation weighs updates, beside sample counts"
    )
    gate: Literal["analytic", "neural", "frozen_random", "uniform"] = Field(
        "analytic", description="frozen_random and uniform are for ablation"
    )
    gate_before_aggregation: bool = Field(
        False, description="For ablation: fit the gate to the experts as they were before the round"
    )
    gate_every: int = Field(
        0,
        ge=0,
        description="Also update the gate each this many rounds; 0 = when evaluating (with "
        "similarity: features also at the branch)",
    )
    gate_temperature: float = Field(0.3, gt=0.0, le=100.0, description="T of the gate's targets")
    gate_features: int = Field(
        0, ge=0, description="Project each expert's features to this many; 0 = keep all"
    )
    gate_epochs: int = Field(1, ge=1, le=100, description="Local epochs of the neural gate")
    gate_lr: float = Field(0.1, gt=0.0, le=10.0, description="Learning rate of the neural gate")
    load_balance: float = Field(0.1, ge=0.0, le=100.0, description="Neural gate's balance term")
    coordination_head: bool = Field(True, description=described("coordination_head"))
    personal_expert: bool = Field(
        True, description="Each client also keeps an expert of its own, which nobody else sees"
    )
    branch_after: int = Field(
        0,
        ge=0,
        description="Experts are one model that everybody trains until after this round; then "
        "they part",
        exclude_if=lambda value: value == 0,
    )
    personal_epochs: int = Field(
        0,
        ge=0,
        le=1000,
        description="Personal experts are fine-tuned for this many epochs from the client's most "
        "correlated expert, before an evaluation; 0 = they go on from their own last weights in "
        "every round",
        exclude_if=lambda value: value == 0,
    )
    personal_pull: float = Field(
        0.0, ge=0.0, le=100.0, description="Proximal pull to the client's mixture of experts"
    )

    @model_validator(mode="after")
    def _possible(self) -> "FedCoESettings":
        if self.experts_per_client > self.experts:
            raise ValueError(
                f"experts_per_client = {self.experts_per_client}: at most experts = {self.experts}"
            )
        if self.similarity == "features" and not self.branch_after:
            raise ValueError(
                "similarity: features compares clients under one common model; set branch_after"
            )
        if self.coordination_head and self.gate == "neural":
            raise ValueError(
                "coordination_head needs gate: analytic (it shares its statistics); "
                "set coordination_head: false"
            )
        return self


@dataclass
class FedCoEMessage(GateMessage):
    """What one shard sends in a gate update. M + C targets in the statistics, or M."""

    parameters: ExactSum = field(default_factory=lambda: ExactSum.zeros(0))
    """Neural gate: sum of n_k * phi_k."""
    samples: int = 0
    losses: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    """Client to [M] mean loss under each expert."""
    shared: ExactSum = field(default_factory=lambda: ExactSum.zeros((SHARED_INPUTS, 1)))
    """[inputs, M] sum of clients' own gates on shared inputs, for the inconsistency."""
    entropies: dict[int, float] = field(default_factory=dict)
    """Client to the mean entropy of its own gate on the shared inputs."""
    features: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    """Client to the [D] mean of its features under the common model, when it branches."""
    class_features: ExactSum = field(default_factory=lambda: ExactSum.zeros(0))
    """[C, D] sum of the same clients' features by class."""

    def merge(self, other: GateMessage) -> None:
        super().merge(other)
        assert isinstance(other, FedCoEMessage)
        self.parameters.merge(other.parameters)
        self.samples += other.samples
        self.losses |= other.losses
        self.shared.merge(other.shared)
        self.entropies |= other.entropies
        self.features |= other.features
        self.class_features.merge(other.class_features)


class FedCoE(Method):
    Settings = FedCoESettings
    has_gate = True
    private = True
    settings: FedCoESettings

    @classmethod
    def predicts_only(cls, settings: MethodSettings) -> frozenset[str]:
        assert isinstance(settings, FedCoESettings)
        found = super().predicts_only(settings)
        if settings.gate == "neural" or settings.gate_before_aggregation:
            # A gate that learns from update to update, experts long gone.
            return found
        # The correlation, which dispatches, comes from labels, features and the experts' losses.
        return found | PREDICTION | {"gate", "gate_features"}

    @property
    def trunk_rounds(self) -> int:
        s, rounds = self.settings, self.federation.settings.train.rounds
        if (
            self.privacy is not None
            or (s.personal_expert and not s.personal_epochs)  # trained in every round
            or s.similarity == "updates"  # reported in the first
            or s.gate == "neural"  # learns from update to update
            or s.gate_before_aggregation  # fits experts of the round before
        ):
            return 0
        return rounds if self.experts == 1 else min(s.branch_after, rounds)

    def inert(self) -> list[str]:
        found = super().inert()
        if self.experts == 1:
            found.append("experts = 1: the gate, the correlation and dispatch decide nothing")
        elif self.settings.branch_after >= self.federation.settings.train.rounds:
            found.append("branch_after: no round is left after it, so the experts never part")
        if self.settings.gate == "neural" and self.federation.settings.faults.attack_statistics:
            found.append("faults.attack_statistics: gate = neural sends none")
        if self.settings.personal_pull and self.settings.personal_epochs:
            found.append("personal_pull: personal_epochs fine-tunes without a pull")
        return found

    def unaccounted(self) -> list[str]:
        s, reasons = self.settings, super().unaccounted()
        if s.gate == "neural":
            reasons.append("method.gate = neural sends weights nobody has bounded; use analytic")
        if s.similarity in ("updates", "features"):
            sent = {"updates": "sketches", "features": "means of features"}[s.similarity]
            reasons.append(f"method.similarity = {s.similarity} sends {sent}; use labels or none")
        if s.dispatch == "label_clusters":
            reasons.append("method.dispatch = label_clusters reads label counts")
        if s.branch_after and s.experts_per_client > 1:
            reasons.append("method.branch_after counts rounds only with experts_per_client: 1")
        return reasons

    def messages(self, round_: int) -> Messages:
        sent = super().messages(round_)
        if self.experts == 1:
            return sent
        losses = sum(self.gate_due(r) and self._losses_sent(r) for r in range(1, round_ + 1))
        return replace(sent, correlation=(self.settings.similarity == "labels") + losses)

    def _losses_sent(self, round_: int) -> bool:
        """With privacy: losses after the last round would decide nothing any more."""
        return self.experts > 1 and round_ < self.federation.settings.train.rounds

    # ---------------------------------------------------------------- server

    def init(self) -> ServerState:
        state = super().init()
        s, f = self.settings, self.federation
        if s.gate == "neural":
            state = state.with_extra(gate=neural_gate.initial(f.shape, self.experts, self._seed))
        if s.similarity == "labels" and self.experts > 1:
            points = correlation.hellinger(f.label_counts)
            if self.privacy is not None:
                points = self.privacy.report(points, "label mixes", 0)
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
        same = replace(state, correlation=np.ones_like(state.correlation))
        if self._together(state.round + 1):
            return self.orders(same, cohort, np.zeros((len(cohort), 1), np.int64))
        rng = stream(self._seed, "dispatch", state.round + 1)
        c, each = state.correlation[list(cohort)], self.settings.experts_per_client
        if self.settings.dispatch == "label_clusters":
            # From label counts alone, whatever the experts have learned since.
            c = self._similar(correlation.hellinger(self.federation.label_counts))[list(cohort)]
        if self.settings.dispatch == "random":
            c = rng.random(c.shape)
        if self.settings.dispatch == "equal_capacity":
            chosen = correlation.dispatch(c, each, rng)
        else:
            # Ties, as of a client that nothing is known of, are broken by draws.
            score = np.log(c) + 1e-6 * rng.random(c.shape)
            chosen = np.sort(np.argsort(-score, axis=1)[:, :each], axis=1)
        weighted = state if self.settings.aggregation == "correlation" else same
        return self.orders(weighted, cohort, chosen)

    def aggregate(
        self, state: ServerState, orders: Sequence[Order], results: Sequence[LocalResult]
    ) -> ServerState:
        after = super().aggregate(state, orders, results)
        if self._together(after.round):
            after = replace(
                after,
                experts=np.tile(after.experts[:1], (self.experts, 1)),
                momentum=np.tile(after.momentum[:1], (self.experts, 1)),
            )
        sketches = {k: v for result in results for k, v in result.sketches.items()}
        if sketches:
            clients = sorted(sketches)
            c = after.correlation.copy()
            c[clients] = self._similar(np.stack([sketches[k] for k in clients]))
            after = replace(after, correlation=c)
        return after

    def _grouped(self, state: ServerState, message: FedCoEMessage) -> ServerState:
        """Clients whose features differ alike from what their labels let expect share an expert."""
        clients = sorted(message.features)
        counts = self.federation.label_counts[clients]
        by_class = message.class_features.value() / np.maximum(counts.sum(axis=0), 1)[:, None]
        means = np.stack([message.features[k] for k in clients])
        c = state.correlation.copy()
        c[clients] = self._similar(correlation.feature_shift(means, counts, by_class))
        return replace(state, correlation=c)

    def _parts_after(self, round_: int) -> bool:
        """Whether clients report their features after this round."""
        s = self.settings
        return s.similarity == "features" and self.experts > 1 and round_ == s.branch_after

    def everybody_reports(self, round_: int) -> bool:
        return super().everybody_reports(round_) or self._parts_after(round_)

    def _together(self, round_: int) -> bool:
        """Whether the experts are still one model in this round."""
        branch = self.settings.branch_after
        return branch > 0 and round_ <= branch

    def gate_update(self, state: ServerState, messages: Sequence[FedCoEMessage]) -> ServerState:
        s = self.settings
        total, *others = messages
        for other in others:
            total.merge(other)
        dropped = float(sum(total.dropped.values()))
        if not total.losses:
            return replace(state, diagnostics={"gate_messages_dropped": dropped})
        if total.statistics is not None:
            weights = self.solve(state, total.statistics).astype(np.float32)
            gate, head = weights[:, : self.experts], weights[:, self.experts :]
            if s.gate == "frozen_random":
                drawn = stream(self._seed, "gate init").standard_normal(gate.shape)
                gate = drawn.astype(np.float32)
            if s.gate != "uniform":
                state = state.with_extra(gate=gate)
            if s.coordination_head:
                state = state.with_extra(head=head)
        else:
            mean = total.parameters.value() / total.samples
            state = state.with_extra(gate=mean.astype(np.float32))
        clients = sorted(total.losses)
        losses = np.stack([total.losses[k] for k in clients])
        if self._together(state.round):
            # All losses are equal and would only wash out what similarity says.
            if total.features:
                state = self._grouped(state, total)
            return replace(state, diagnostics={"gate_messages_dropped": dropped})
        diagnostics = {"gate_messages_dropped": dropped}
        if self.privacy is not None:
            if not self._losses_sent(state.round):
                return replace(state, diagnostics=diagnostics)
            losses -= losses.mean(axis=1, keepdims=True)
            losses = self.privacy.report(losses, "losses", state.round)
        c = state.correlation.copy()
        c[clients] = correlation.normalise(
            s.correlation_momentum * c[clients]
            + (1 - s.correlation_momentum) * correlation.from_losses(losses, s.loss_sharpness),
            s.correlation_floor,
        )
        if self.privacy is None:
            shared = total.shared.value() / len(clients)
            spread = _entropy(shared) - sum(total.entropies[k] for k in clients) / len(clients)
            diagnostics = {"gating_inconsistency": spread} | diagnostics
        return replace(state, correlation=c, diagnostics=diagnostics)

    # --------------------------------------------------------------- clients

    def fits(self, side: ClientSide, state: ServerState, order: Order) -> list[Fit]:
        s, client = self.settings, order.client
        fits = super().fits(side, state, order)
        if s.responsibility == "posterior" and len(order.experts) > 1:
            r = self._responsibilities(side, state, order)
            fits = [replace(fit, sample_weights=r[:, i]) for i, fit in enumerate(fits)]
        if s.personal_expert and not s.personal_epochs:
            c = state.correlation[client]
            last = int(state.personal_round[client])
            start: Vector = (
                side.personal.load(client, last) if last else state.experts[int(c.argmax())]
            )
            anchor = (c @ state.experts).astype(np.float32) if s.personal_pull else None
            fits.append(Fit(client, -1, start, anchor=anchor, pull=s.personal_pull))
        return fits

    @property
    def finetune_epochs(self) -> int:
        return self.settings.personal_epochs if self.settings.personal_expert else 0

    def finetune_start(self, state: ServerState, client: int) -> Vector:
        return np.asarray(state.experts[int(state.correlation[client].argmax())])

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
        scaled = log_c - prediction.sample_losses(logits, labels) / self.settings.gate_temperature
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
    ) -> FedCoEMessage:
        s, trainer = self.settings, side.trainer
        shared = side.data.dataset.x_test[:SHARED_INPUTS]
        shared_design = self.forward(trainer, state, shared, self._analytic)[1]
        message = FedCoEMessage(None, shared=ExactSum.zeros((len(shared), self.experts)))
        if self._analytic:
            message.statistics = Statistics.zeros(shared_design.shape[1], self._targets)
        else:
            # Weighted by n_k: a coarser grid, for larger sums.
            message.parameters = ExactSum.zeros(state.extra["gate"].shape, bits=30)
        parting = self._parts_after(state.round)
        if parting:
            shape = (self.federation.classes, self.feature_width)
            message.class_features = ExactSum.zeros(shape, bits=30)
        for client in clients:
            images, labels = side.data.train(client)
            logits, design = self.forward(trainer, state, images, self._analytic)
            losses = prediction.sample_losses(logits, labels)
            q = np.exp(log_softmax(-losses / s.gate_temperature, axis=1))
            y = np.eye(self.federation.classes)[labels]
            targets = np.concatenate([q, y], axis=1)[:, : self._targets]
            targets, reason = self.faults.statistics(state.round, client, design, targets)
            if reason is None and not np.all(np.isfinite(losses)):
                reason = "not finite"
            if parting and reason is None:
                features = trainer.outputs(state.experts[0], images, self.batch_size, True)[1]
                assert features is not None
                try:
                    message.class_features.add(y.T @ features.astype(np.float64))
                    message.features[client] = features.mean(axis=0, dtype=np.float64)
                except OverflowError:
                    reason = "too large"
            if reason is not None:
                message.dropped[reason] += 1
                if self.privacy is not None:
                    # Its absence would be one more message.
                    message.losses[client] = np.zeros(self.experts)
                    if message.statistics is not None:
                        message.statistics.count += 1
                continue
            if message.statistics is not None:
                if self.privacy is not None:
                    self.privacy.add(message.statistics, design, targets)
                    message.losses[client] = losses.mean(axis=0)
                    continue
                design, targets, q = self.weighed(labels, design, targets, q)
                mine = Statistics.zeros(design.shape[1], self._targets)
                mine.add(design, targets)
                message.statistics.merge(mine)
                if self._together(state.round):
                    message.losses[client] = losses.mean(axis=0)
                    continue  # gates of one model agree
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
    def _analytic(self) -> bool:
        """Whether clients send statistics of features rather than a trained gate."""
        return self.settings.gate != "neural"

    @property
    def closed_form(self) -> bool:
        return self._analytic

    @property
    def _targets(self) -> int:
        """Columns of F'[Q | Y]; Y only where there is a coordination head."""
        return self.experts + self.federation.classes * self.settings.coordination_head

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
        if self._analytic:
            return np.asarray(design @ state.extra["gate"], np.float32)
        gate = state.extra["gate"]
        return neural_gate.scores(trainer, gate, self.experts, images, self.batch_size)

    # ------------------------------------------------------------ prediction

    def score(self, trainer: Trainer, state: ServerState, images: NDArray[np.uint8]) -> Scores:
        logits, design = self.forward(trainer, state, images, self._analytic)
        gate, head = self._gate(trainer, state, images, design), self.head_scores(state, design)
        return Scores(logits, gate, head)

    def log_gate(self, state: ServerState, scores: Scores) -> Log:
        if scores.gate is None:
            return super().log_gate(state, scores)
        # Ridge scores are no probabilities until calibrated.
        sharpness = state.calibration.get("global.gate", self._sharpness)
        return prediction.log_posterior(scores.gate, sharpness)

    @property
    def _sharpness(self) -> float:
        """Of the gate before calibration."""
        return 10.0 if self._analytic else 1.0

    def grids(self) -> dict[str, tuple[float, tuple[float, ...]]]:
        sharp = (0.0, 1.0, 3.0, 10.0, 30.0) if self._analytic else (0.0, 1.0, 2.0)
        return super().grids() | {
            "gate": (sharp[-2], sharp),
            "correlation": (1.0, (0.0, 0.5, 1.0, 2.0)),
        }

    def correlation_unlabelled(self, state: ServerState, inputs: Scores) -> NDArray[np.float64]:
        mean = self.mean_gate(state, inputs)[None]
        return np.asarray(correlation.normalise(mean, self.settings.correlation_floor)[0])

    def correlation_labelled(
        self, state: ServerState, inputs: Scores, labels: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        losses = prediction.sample_losses(inputs.experts, labels).mean(axis=0)
        c = correlation.from_losses(losses[None], self.settings.loss_sharpness)
        return np.asarray(correlation.normalise(c, self.settings.correlation_floor)[0])

    # ------------------------------------------------------------- accounting

    def gate_bytes(self, state: ServerState, clients: int, round_: int) -> tuple[int, int]:
        experts, parameters = state.experts.shape
        if self.settings.gate == "neural":
            up = 4 * (state.extra["gate"].size + experts)
        else:
            up = message_bytes(self.design_width, self._targets) + 4 * experts
        if self._parts_after(round_):
            up += 4 * (self.federation.classes + 1) * self.feature_width
        return clients * up, clients * 4 * experts * parameters


def _entropy(p: NDArray[np.float64]) -> float:
    """Mean entropy of [n, M] distributions, in nats."""
    return float(-(p * np.log(np.maximum(p, 1e-12))).sum(axis=1).mean())
