"""What a method is: a handful of functions from state to state, on the server or beside clients.

The round loop (`flows/federated_training.py`) calls them in this order:

    init                          server    initial experts
    dispatch                      server    who trains what
    local_train                   clients   -> one `LocalResult` a shard
    aggregate                     server    -> new experts
    gate_message, gate_update     clients, server (only with a gate or a coordination head)
    personalize                   clients   (only methods that fine-tune)
    score, predict_*              wherever something is predicted

Functions that take a `ClientSide` run in workers; all others on the server. The defaults here are
those of a pool of experts without a gate; with one expert they are FedAvg.

The coordination head is a switch of every method: clients send the sums F'F and F'Y of the experts'
features, the server solves for a global classifier on them (`fedcoe.analytic`), and temperatures
and the weight between it and the experts' own outputs are fitted on validation.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from fedcoe import prediction, robust
from fedcoe.analytic import Statistics, design_matrix, message_bytes, projections
from fedcoe.config import FaultSettings, Settings
from fedcoe.engine.clients import TRAIN, ClientData
from fedcoe.engine.pool import ClientSide
from fedcoe.engine.trainer import Fit, LocalWork, Phase, Trainer
from fedcoe.errors import FedCoEError
from fedcoe.exact_sum import ExactSum
from fedcoe.faults import Faults, Inbox, Update, square_norm
from fedcoe.methods.settings import MethodSettings
from fedcoe.models import Expert, build_expert
from fedcoe.models.experts import Shape
from fedcoe.models.flat import Vector, initial_vector
from fedcoe.patches import Patches, patch_width
from fedcoe.prediction import Log
from fedcoe.privacy import Messages, Privacy, epsilon
from fedcoe.robust import Single
from fedcoe.state import ServerState
from fedcoe.streams import stream


@dataclass(frozen=True)
class Federation:
    """What the server knows before the first round. S seen clients, C classes."""

    settings: Settings
    shape: tuple[int, int, int]
    classes: int
    label_counts: NDArray[np.int64]
    """[S, C] of the seen clients' training splits."""
    names: tuple[str, ...]
    """[S] of the seen clients."""
    groups: tuple[int, ...]
    """[S] feature groups, for tables only: no method reads them."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, settings: Settings, data: ClientData) -> "Federation":
        """Read it off a dataset and its partition."""
        info, partition = data.dataset.info, data.partition
        height, width, channels = info.shape
        counts = partition.label_counts(data.dataset.y_train, len(info.classes), TRAIN)
        return cls(
            settings,
            (height, width, channels),
            len(info.classes),
            counts[: partition.seen],
            partition.names[: partition.seen],
            tuple(int(group) for group in partition.group[: partition.seen]),
            tuple(info.classes),
            tuple(info.mean),
            tuple(info.std),
        )

    @property
    def clients(self) -> int:
        return len(self.label_counts)

    @property
    def train_counts(self) -> NDArray[np.int64]:
        """[S] training samples of each seen client."""
        return np.asarray(self.label_counts.sum(axis=1))

    @property
    def label_prior(self) -> NDArray[np.float64]:
        """[C] of all seen clients' training data together; unknown, so uniform, with privacy."""
        if self.settings.privacy.epsilon:
            return np.full(self.classes, 1.0 / self.classes)
        return prediction.prior_from_counts(self.label_counts.sum(axis=0))


@dataclass(frozen=True)
class Order:
    """What one client of the cohort is asked to train: experts and their aggregation weights
    n_k c[k,m], normalised over the cohort for each expert."""

    client: int
    experts: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass
class LocalResult:
    """What one shard of clients sends back: exact sums, and single updates only where robust
    aggregation cannot do without."""

    updates: ExactSum
    """[M, P] sum of weight * (trained - sent)."""
    weights: ExactSum
    """[M] sum of weights of valid updates."""
    square_norms: ExactSum
    """[M] sum of weight * ||trained - sent||^2, for drift."""
    images: int = 0
    losses: list[float] = field(default_factory=list)
    """Mean loss * samples of every valid update."""
    samples: int = 0
    valid: int = 0
    """Experts' updates in the sums."""
    personal: list[int] = field(default_factory=list)
    """Clients whose personal expert was trained."""
    sketches: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    """Client to a few numbers it reports, e.g. a sketch of its update."""
    dropped: Counter[str] = field(default_factory=Counter)
    extra: dict[str, ExactSum] = field(default_factory=dict)
    """Further sums that only some methods send."""
    singles: list[Single] = field(default_factory=list)
    """Every valid update, where `robust.needs_singles`."""

    @classmethod
    def zeros(cls, experts: int, parameters: int) -> "LocalResult":
        return cls(
            ExactSum.zeros((experts, parameters)),
            ExactSum.zeros(experts),
            ExactSum.zeros(experts, bits=30),
        )

    @property
    def train_loss(self) -> float:
        """Mean over samples; `fsum` rounds once, so that the order of clients does not matter."""
        return math.fsum(self.losses) / max(self.samples, 1)

    def merge(self, other: "LocalResult") -> None:
        self.updates.merge(other.updates)
        self.weights.merge(other.weights)
        self.square_norms.merge(other.square_norms)
        self.images += other.images
        self.losses += other.losses
        self.samples += other.samples
        self.valid += other.valid
        self.personal += other.personal
        self.sketches |= other.sketches
        self.dropped += other.dropped
        self.singles += other.singles
        for name, total in other.extra.items():
            own = self.extra.setdefault(name, ExactSum.zeros(total.total.shape, total.bits))
            own.merge(total)


@dataclass
class GateMessage:
    """What one shard sends in a gate update."""

    statistics: Statistics | None
    """Sums for whatever is closed-form."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Clients left out, by reason."""

    def merge(self, other: "GateMessage") -> None:
        if self.statistics is not None and other.statistics is not None:
            self.statistics.merge(other.statistics)
        self.dropped += other.dropped


@dataclass(frozen=True)
class Scores:
    """Every model's outputs for n images, computed once and shared by all predictions."""

    experts: NDArray[np.float32]
    """[M, n, C] logits."""
    gate: NDArray[np.float32] | None = None
    """[n, M]."""
    head: NDArray[np.float32] | None = None
    """[n, C] of the coordination head."""
    personal: NDArray[np.float32] | None = None
    """[n, C] logits of the client's personal expert."""

    def rows(self, part: slice | NDArray[np.int64]) -> "Scores":
        """The same outputs for some of the images."""

        def cut(a: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
            return None if a is None else a[part]

        return Scores(self.experts[:, part], cut(self.gate), cut(self.head), cut(self.personal))


class Method:
    """Base of all methods: `settings` and `federation` are its only state."""

    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    has_gate: ClassVar[bool] = False
    has_global: ClassVar[bool] = True
    """Whether there is a global model at all; without one only personalized figures mean much."""
    own_model_alone: ClassVar[bool] = False
    """Whether a client is predicted by its own model alone, unless `blend` says otherwise."""
    personal_models: ClassVar[bool] = True
    """Whether what a client keeps on disk is a model that it predicts with."""
    keeps_trained: ClassVar[bool] = False
    """Whether a client keeps its trained copy of an expert as its personal model."""
    sends_updates: ClassVar[bool] = True
    """Whether clients send anything in a round that could be late, broken or made up."""
    heavy_ball: ClassVar[bool] = True
    """Whether `server_momentum` is momentum as FedAvgM's, of which row `all` wants 0.7 or more."""
    is_fedavg: ClassVar[bool] = False
    """Whether its rounds are those of FedAvg with the same switches."""
    private: ClassVar[bool] = False
    """Whether all its clients send is bounded and noised where `privacy` asks for it."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.settings: Any = federation.settings.method
        if federation.settings.privacy.epsilon and (unaccounted := self.unaccounted()):
            raise FedCoEError(f"privacy.epsilon: {'; '.join(unaccounted)}")

    @staticmethod
    def build(name: str, shape: Shape, classes: int, seed: int) -> Expert:
        """Make a model of the architecture that clients train; the head's parameters come last."""
        return build_expert(name, shape, classes, seed)

    # ---------------------------------------------------------------- server

    @property
    def experts(self) -> int:
        """M: the setting `experts`, where a method has it."""
        return int(getattr(self.settings, "experts", 1))

    @property
    def finetune_epochs(self) -> int:
        """Epochs of fine-tuning before an evaluation (`personalize`), where a method has it."""
        return int(getattr(self.settings, "finetune_epochs", 0))

    @property
    def trunk_rounds(self) -> int:
        """The first rounds in which this is FedAvg with the same switches: one model, trained by
        all of a cohort on nothing but their data, and no gate update that later rounds depend on.

        0 where that is not known. Trainings share such rounds (`fedcoe.trunk`).
        """
        shared = self.is_fedavg and self.privacy is None
        return self.federation.settings.train.rounds if shared else 0

    @property
    def gate_every(self) -> int:
        """Gate updates also between evaluations, each this many rounds; 0 = none."""
        return int(getattr(self.settings, "gate_every", 0))

    @property
    def gate_before_aggregation(self) -> bool:
        """Whether clients fit the gate to the experts as they were before the round."""
        return bool(getattr(self.settings, "gate_before_aggregation", False))

    @property
    def gate_features(self) -> int:
        """Features an expert's are projected to for what is closed-form; 0 = all are kept."""
        return int(getattr(self.settings, "gate_features", 0))

    @classmethod
    def predicts_only(cls, settings: MethodSettings) -> frozenset[str]:
        """Names of settings that decide how trained experts predict, and nothing in training."""
        return frozenset({"reweighting"})

    @property
    def shares(self) -> tuple[float, ...]:
        """Weights b_k of a client's personal expert that validation chooses among."""
        alone = self.own_model_alone and not self.settings.blend
        return (1.0,) if alone else tuple(np.linspace(0.0, 1.0, 11))

    def inert(self) -> list[str]:
        """Settings that are on and change nothing with this method, one sentence each."""
        s, found = self.settings, []
        if s.robust_clip and s.robust != "norm_clip":
            found.append(f"robust_clip: robust = {s.robust} has no such limit")
        if s.balanced_head and self.federation.settings.privacy.epsilon:
            found.append("balanced_head: with privacy nobody knows how often a class occurs")
        if s.blend and not self.own_model_alone:
            found.append("blend: no client is predicted by a model of its own alone")
        for name in ("patch_filters", "balanced_head"):
            if getattr(s, name) and not self.closed_form:
                found.append(f"{name}: there is neither a coordination head nor an analytic gate")
        if s.robust_trim != 0.2 and s.robust != "trimmed_mean":
            found.append(f"robust_trim: robust = {s.robust} trims nothing")
        return found + self.inert_faults()

    def inert_faults(self) -> list[str]:
        """Of the simulated faults, what is asked for and changes nothing."""
        faults, found = self.federation.settings.faults, []
        if not self.sends_updates:
            if faults == FaultSettings():
                return []
            return [f"faults: with {self.settings.name} clients send no updates to be broken"]
        if faults.attack != "none" and not self.faults.attackers:
            found.append(f"faults.attack: attackers = {faults.attackers:g} rounds to no client")
        if faults.attack_statistics and faults.attack == "none":
            found.append("faults.attack_statistics: attack = none")
        elif faults.attack_statistics and not self.coordinates:
            found.append(
                "faults.attack_statistics: without a coordination head or gate none are sent"
            )
        return found

    def unaccounted(self) -> list[str]:
        """Why privacy cannot be promised with these settings, one sentence each."""
        f, delta = self.federation, self.federation.settings.privacy.delta
        reasons = []
        if not self.private:
            reasons.append(f"method {self.settings.name} sends what nobody has bounded")
        if self.settings.robust != "none":
            reasons.append(f"method.robust = {self.settings.robust} is not a sum of updates")
        if f.clients and delta >= 1 / f.clients:
            reasons.append(
                f"delta = {delta:g} must be below 1 / {f.clients} seen clients, or publishing "
                "one of them whole would do"
            )
        return reasons

    @cached_property
    def privacy(self) -> Privacy | None:
        """The mechanisms of this run, or None where privacy is off."""
        settings = self.federation.settings
        if not settings.privacy.epsilon:
            return None
        rounds = range(1, settings.train.rounds + 1)
        cohorts = [self.cohort_of(r) for r in rounds]
        taken = np.bincount(np.concatenate(cohorts), minlength=self.federation.clients)
        planned = replace(self.messages(settings.train.rounds), updates=float(taken.max()))
        return Privacy(settings.privacy, settings.train.seed, planned)

    def messages(self, round_: int) -> Messages:
        """What a client has sent in gate updates by the end of a round; updates left out."""
        return Messages(statistics=sum(self.gate_due(r) for r in range(1, round_ + 1)))

    def privacy_spent(self, state: ServerState) -> dict[str, float]:
        """epsilon and delta of the client that has sent most so far; empty without privacy."""
        if self.privacy is None:
            return {}
        each, sent = (
            getattr(self.settings, "experts_per_client", self.experts),
            self.messages(state.round),
        )
        rounds = np.unique(state.dispatched.sum(axis=1) // each)
        delta = self.privacy.settings.delta
        clients = [replace(sent, updates=float(n)) for n in rounds]
        return {"epsilon": epsilon(self.privacy.z, clients, delta), "delta": delta}

    def evaluation_due(self, round_: int) -> bool:
        """Whether there is an evaluation after a round."""
        f = self.federation.settings
        return round_ % f.evaluate.every == 0 or round_ == f.train.rounds

    def gate_due(self, round_: int) -> bool:
        """Whether there is a gate update after a round."""
        also = self.gate_every > 0 and round_ % self.gate_every == 0
        return self.coordinates and (also or self.everybody_reports(round_))

    def everybody_reports(self, round_: int) -> bool:
        """Whether all seen clients, not just the cohort, take part in a gate update then."""
        return self.evaluation_due(round_)

    @property
    def coordinates(self) -> bool:
        """Whether there are gate updates, for a gate, a coordination head or both; then `pooled`
        predicts, with temperatures and weights fitted on validation."""
        return self.has_gate or self.settings.coordination_head

    @property
    def closed_form(self) -> bool:
        """Whether anything is solved from statistics of features."""
        return self.coordinates and bool(self.settings.coordination_head)

    def init(self) -> ServerState:
        """Initial state: all experts start from the same weights, so their updates compare."""
        f = self.federation
        experts = np.tile(self.initial_experts(1), (self.experts, 1))
        return ServerState(
            round=0,
            experts=experts,
            momentum=np.zeros_like(experts),
            correlation=np.full((f.clients, self.experts), 1.0 / self.experts),
            dispatched=np.zeros((f.clients, self.experts), np.int64),
            personal_round=np.zeros(f.clients, np.int64),
            share=np.zeros(f.clients),
        )

    def initial_experts(self, count: int) -> NDArray[np.float32]:
        """[count, P] initial weights that differ; the first are those all methods start from."""
        f = self.federation
        rng = stream(f.settings.train.seed, "init")
        seeds = [int(rng.integers(2**31)) for _ in range(count)]
        return np.stack(
            [
                initial_vector(self.build(f.settings.model.name, f.shape, f.classes, seed))
                for seed in seeds
            ]
        )

    def cohort(self, state: ServerState) -> list[int]:
        """Seen clients that take part in the coming round, ascending. Equal for all methods."""
        return self.cohort_of(state.round + 1)

    def cohort_of(self, round_: int) -> list[int]:
        """The cohort of a round: the seed alone decides it."""
        train = self.federation.settings.train
        size = max(1, round(self.federation.clients * train.cohort))
        rng = stream(train.seed, "cohort", round_)
        chosen = rng.choice(self.federation.clients, size, replace=False)
        return sorted(int(k) for k in chosen)

    def dispatch(self, state: ServerState, cohort: Sequence[int]) -> list[Order]:
        """Everyone trains every expert."""
        return self.orders(state, cohort, np.tile(np.arange(self.experts), (len(cohort), 1)))

    def orders(
        self, state: ServerState, cohort: Sequence[int], experts: NDArray[np.int64]
    ) -> list[Order]:
        """Attach the weights a[k,m] = n_k c[k,m] / sum_j n_j c[j,m] to a dispatch [n, K].

        With privacy every client counts the same: sample counts and losses are its own affair.
        """
        n = self.federation.train_counts[list(cohort)]
        raw = n[:, None] * np.take_along_axis(state.correlation[list(cohort)], experts, axis=1)
        if self.privacy is not None:
            raw = np.ones_like(raw)
        total = np.bincount(experts.ravel(), raw.ravel(), minlength=self.experts)
        weights = raw / total[experts]
        return [
            Order(client, tuple(map(int, mine)), tuple(map(float, w)))
            for client, mine, w in zip(cohort, experts, weights, strict=True)
        ]

    def aggregate(
        self, state: ServerState, orders: Sequence[Order], results: Sequence[LocalResult]
    ) -> ServerState:
        """`server_step` with the mean updates sum_k a[k,m] (theta_km - theta_m), or what `robust`
        puts in their place.

        An expert that nobody trained stays as it is.
        """
        total = merged(results)
        weight = total.weights.value()
        trained = weight > 0
        means = total.updates.value() / np.where(trained, weight, 1.0)[:, None]
        if robust.needs_singles(self.settings):
            means = robust.combine(self.settings, total.singles, means.shape)
        if self.privacy is not None:
            asked = np.bincount([m for o in orders for m in o.experts], minlength=self.experts)
            trained = asked > 0
            means = self.privacy.noised(total.updates.value(), asked, state.round + 1)
        after = self.server_step(state, means)
        personal = state.personal_round.copy()
        personal[total.personal] = state.round + 1
        dispatched = state.dispatched.copy()
        for order in orders:
            dispatched[order.client, list(order.experts)] += 1
        keep = ~trained[:, None]
        return replace(
            after,
            round=state.round + 1,
            experts=np.where(keep, state.experts, after.experts),
            momentum=np.where(keep, state.momentum, after.momentum),
            personal_round=personal,
            dispatched=dispatched,
        )

    def server_step(self, state: ServerState, update: NDArray[np.float64]) -> ServerState:
        """theta_m <- theta_m + eta * v_m,  v_m <- beta v_m + update_m.

        Args:
            update: [M, P] mean updates; 0 for an expert that nobody trained.
        """
        momentum = self.settings.server_momentum * state.momentum + update
        experts = state.experts + self.settings.server_lr * momentum
        return replace(
            state, experts=experts.astype(np.float32), momentum=momentum.astype(np.float32)
        )

    def gate_update(self, state: ServerState, messages: Sequence[Any]) -> ServerState:
        """Server half of the gate update; only called when `coordinates`."""
        total, *others = messages
        for other in others:
            total.merge(other)
        dropped = {"gate_messages_dropped": float(sum(total.dropped.values()))}
        if not total.statistics.count:
            return replace(state, diagnostics=dropped)
        head = self.solve(state, total.statistics).astype(np.float32)
        return replace(state.with_extra(head=head), diagnostics=dropped)

    def solve(self, state: ServerState, statistics: Statistics) -> NDArray[np.float64]:
        """[D, T] the ridge regression on all clients' statistics; of noised ones with privacy."""
        if self.privacy is not None:
            return self.privacy.solve(statistics, self.settings.ridge, state.round)
        return statistics.solve(self.settings.ridge)

    # --------------------------------------------------------------- clients

    def work(self, round_: int) -> LocalWork:
        """This round's local work, after the learning-rate schedule."""
        t = self.federation.settings.train
        progress = (round_ - 1) / t.rounds
        factor = 0.5 * (1 + np.cos(np.pi * progress)) if t.lr_schedule == "cosine" else 1.0
        return LocalWork(
            round_,
            t.local_epochs,
            t.batch_size,
            t.lr * float(factor),
            t.momentum,
            t.weight_decay,
            t.clip_norm,
            t.augment,
            t.seed,
        )

    def logit_shift(self, client: int) -> NDArray[np.float32] | None:
        """[C] log label prior for balanced softmax, or None where that is off."""
        if not self.settings.balanced_softmax:
            return None
        return np.log(prediction.prior_from_counts(self.federation.label_counts[client])).astype(
            np.float32
        )

    def fits(self, side: ClientSide, state: ServerState, order: Order) -> list[Fit]:
        """The models one client trains this round; `name` is the expert, -1 a personal one."""
        shift = self.logit_shift(order.client)
        return [Fit(order.client, m, state.experts[m], shift) for m in order.experts]

    def personal_start(self, side: ClientSide, state: ServerState, client: int) -> Vector:
        """[P] a client's personal expert as it left it, or the weights all methods start from."""
        last = int(state.personal_round[client])
        return side.personal.load(client, last) if last else self.initial_experts(1)[0]

    def training_losses(
        self, logits: NDArray[np.float32], labels: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """[M, n, C] logits on one client's samples to [n, M] of the loss experts are trained on."""
        if self.settings.balanced_softmax:
            counts = np.bincount(labels, minlength=self.federation.classes)
            logits = logits + np.log(prediction.prior_from_counts(counts)).astype(np.float32)
        return prediction.sample_losses(logits, labels)

    def local_train(
        self, side: ClientSide, state: ServerState, orders: Sequence[Order]
    ) -> LocalResult:
        """Train one shard of the cohort and add its updates up, one at a time."""
        result, round_ = LocalResult.zeros(*state.experts.shape), state.round + 1
        inbox = self.inbox(state, orders)
        answering = self.faults.answering(round_, (order.client for order in orders))
        working = [order for order in orders if order.client in answering]
        fits = (fit for order in working for fit in self.fits(side, state, order))
        for fit, trained in side.trainer.fit(fits, self.work(round_), side.data):
            result.images += trained.images
            if fit.name < 0:
                if np.all(np.isfinite(trained.vector)):
                    side.personal.save(fit.client, round_, trained.vector)
                    result.personal.append(fit.client)
                else:
                    result.dropped["personal not finite"] += 1
                continue
            kept = trained.vector.copy() if self.keeps_trained else None
            # In place: the trained vector is not needed any more, and it is large.
            delta = np.subtract(trained.vector, state.experts[fit.name], out=trained.vector)
            for update in self.faults.sent(Update(fit.client, fit.name, round_, delta)):
                counted = self.receive(inbox, result, update)
                if counted is None:
                    continue
                if kept is not None:
                    side.personal.save(fit.client, round_, kept)
                    result.personal.append(fit.client)
                result.losses.append(trained.loss * trained.images)
                result.samples += trained.images
                self.note(side, state, result, fit, counted)
        if inbox.unanswered:
            result.dropped["no answer"] += inbox.unanswered
        return result

    @cached_property
    def faults(self) -> Faults:
        """The simulated client faults of this run."""
        settings = self.federation.settings
        faults = settings.faults if self.sends_updates else FaultSettings()
        return Faults(faults, settings.train.seed, self.federation.clients)

    def inbox(self, state: ServerState, orders: Sequence[Order]) -> Inbox:
        """Where the answers to these orders arrive."""
        weights = {
            (order.client, expert): weight
            for order in orders
            for expert, weight in zip(order.experts, order.weights, strict=True)
        }
        longest = self.federation.settings.train.max_update_norm
        return Inbox(weights, state.round + 1, state.experts.shape[1], longest)

    def receive(self, inbox: Inbox, result: LocalResult, update: Update) -> Vector | None:
        """Add an update that arrived to a shard's sums, or count why it is left out.

        Returns:
            [P] the update as it counts, shortened where clipping asks for it; None if left out.
        """
        reason = inbox.refuse(update)
        if reason is not None:
            result.dropped[reason] += 1
            return None
        delta, weight = update.delta, inbox.weights[update.client, update.expert]
        if self.privacy is not None:
            delta = self.privacy.clip(delta, inbox.asked(update.client))
        if robust.needs_singles(self.settings):
            result.singles.append(Single(update.expert, weight, delta))
        elif self.settings.robust == "norm_clip":
            delta = robust.shortened(delta, self.settings.robust_clip)
        add_at(result, update.expert, delta, weight)
        return delta

    def note(
        self,
        side: ClientSide,
        state: ServerState,
        result: LocalResult,
        fit: Fit,
        delta: Vector,
    ) -> None:
        """Hook: what else a client reports about an update."""

    def personalize(
        self, side: ClientSide, state: ServerState, clients: Sequence[int]
    ) -> tuple[list[int], int]:
        """Fine-tune an expert on each client; what comes out is its personal model.

        Only called when `finetune_epochs` is not 0. Like few-shot, at the peak learning rate.

        Returns:
            Clients whose model is finite and kept under `state.round`, and images trained on.
        """
        work = replace(self.work(1), round=state.round)
        phases = (Phase(self.finetune_epochs),)
        fits = (Fit(k, -1, self.finetune_start(state, k), phases=phases) for k in clients)
        kept, images = [], 0
        for fit, trained in side.trainer.fit(fits, work, side.data):
            images += trained.images
            if np.all(np.isfinite(trained.vector)):
                side.personal.save(fit.client, state.round, trained.vector)
                kept.append(fit.client)
        return kept, images

    def finetune_start(self, state: ServerState, client: int) -> Vector:
        """[P] what fine-tuning on a client starts from."""
        return np.asarray(state.experts[0])

    def gate_message(self, side: ClientSide, state: ServerState, clients: Sequence[int]) -> Any:
        """Clients' half of the gate update for one shard; only called when `coordinates`."""
        statistics = Statistics.zeros(self.design_width, self.federation.classes)
        message = GateMessage(statistics)
        for client in clients:
            images, labels = side.data.train(client)
            _, design = self.forward(side.trainer, state, images)
            targets = np.eye(self.federation.classes)[labels]
            targets, reason = self.faults.statistics(state.round, client, design, targets)
            if reason is not None:
                message.dropped[reason] += 1
                if self.privacy is not None:
                    statistics.count += 1  # how many answered would be one more message
            elif self.privacy is not None:
                self.privacy.add(statistics, design, targets)
            else:
                statistics.add(*self.weighed(labels, design, targets))
        return message

    def weighed(
        self, labels: NDArray[np.int64], *rows: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], ...]:
        """Arrays [n, ...] as they enter sums of products: with `balanced_head`, samples count
        1 / (C prior), so that all seen clients' samples of a class weigh as much together as those
        of any other."""
        if not self.settings.balanced_head:
            return rows
        prior = self.federation.label_prior
        root = np.sqrt(1.0 / (len(prior) * prior[labels]))[:, None]
        return tuple(root * part for part in rows)

    # ------------------------------------------------------------ prediction

    @property
    def batch_size(self) -> int:
        """Images in a batch when nothing is trained."""
        return self.federation.settings.evaluate.batch_size

    @cached_property
    def patches(self) -> Patches | None:
        """The random patch features of the coordination head, where there are any."""
        f, filters = self.federation, self.settings.patch_filters
        return Patches(f.shape, filters, f.settings.train.seed) if filters else None

    def forward(
        self,
        trainer: Trainer,
        state: ServerState,
        images: NDArray[np.uint8],
        features: bool = True,
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """[M, n, C] logits and [n, D] design matrix; without `features` D = 0."""
        outputs: list[Any] = []
        for m, expert in enumerate(state.experts):
            # Until they part, experts are one model: it is run once.
            same = m > 0 and np.array_equal(expert, state.experts[m - 1])
            outputs.append(
                outputs[-1] if same else trainer.outputs(expert, images, self.batch_size, features)
            )
        logits = np.stack([logit for logit, _ in outputs])
        hidden = [f for _, f in outputs if f is not None]
        if not features:
            return logits, np.zeros((len(images), 0))
        seed = self.federation.settings.train.seed
        projection = projections(self.experts, hidden[0].shape[1], self.gate_features, seed)
        patches = None
        if self.patches is not None:
            patches = self.patches.to(trainer.device).run(images, self.batch_size)
        return logits, design_matrix(hidden, projection, patches)

    def score(self, trainer: Trainer, state: ServerState, images: NDArray[np.uint8]) -> Scores:
        """Run every global model once over n images [n, H, W, C]."""
        logits, design = self.forward(trainer, state, images, "head" in state.extra)
        return Scores(logits, head=self.head_scores(state, design))

    def head_scores(
        self, state: ServerState, design: NDArray[np.float64]
    ) -> NDArray[np.float32] | None:
        """[n, C] of the coordination head, or None before the first gate update."""
        head = state.extra.get("head") if self.settings.coordination_head else None
        return None if head is None else np.asarray(design @ head, np.float32)

    def personal_logits(
        self, side: ClientSide, state: ServerState, client: int, images: NDArray[np.uint8]
    ) -> NDArray[np.float32] | None:
        """[n, C] of a seen client's personal expert, or None if it has none yet."""
        last = int(state.personal_round[client])
        if not last:
            return None
        vector = side.personal.load(client, last)
        return side.trainer.outputs(vector, images, self.batch_size)[0]

    @property
    def head_prior(self) -> NDArray[np.float64]:
        """[C] label prior that the coordination head's scores assume."""
        return self.uniform if self.settings.balanced_head else self.federation.label_prior

    @property
    def trained_prior(self) -> NDArray[np.float64]:
        """[C] label prior that the experts' outputs assume: uniform with balanced softmax."""
        if self.settings.balanced_softmax:
            return self.uniform
        return self.federation.label_prior

    @property
    def pooled_prior(self) -> NDArray[np.float64]:
        """[C] label prior that `pooled` predicts under: uniform with a coordination head.

        Without, that of the experts, for every method: taking the seen clients' label mix out of a
        global prediction is no part of a gate, and it helps on a balanced test set.
        """
        return self.uniform if self.settings.coordination_head else self.trained_prior

    def grids(self) -> dict[str, tuple[float, tuple[float, ...]]]:
        """What is calibrated: start value and the values tried. Nothing here without a head."""
        if not self.settings.coordination_head:
            return {}
        return {
            "head": (0.5, (0.0, 0.25, 0.5, 0.75, 1.0)),
            "head_sharpness": (8.0, (3.0, 5.0, 8.0, 12.0, 18.0, 27.0)),
            "experts": (1.0, (0.25, 0.4, 0.6, 0.8, 1.0, 1.25)),
        }

    def calibration(self, state: ServerState, scope: str) -> Mapping[str, float]:
        return {
            name: state.calibration.get(f"{scope}.{name}", start)
            for name, (start, _) in self.grids().items()
        }

    def calibrate(
        self,
        state: ServerState,
        validation: Mapping[int, tuple[Scores, NDArray[np.int64]]],
    ) -> ServerState:
        """Fit temperatures and weights by coordinate search on the validation likelihood.

        Federated form: for each candidate a client sends one number, its summed loss. Twice:
        `global` predicts without, `client` with the client's label prior and correlation. With
        privacy those numbers are not sent, and all stays at its start.

        Args:
            validation: seen clients' outputs and labels on their validation splits, by client.
        """
        if not self.coordinates or self.privacy is not None:
            return state
        f = self.federation

        def loss(scope: str) -> Callable[[Mapping[str, float]], float]:
            def total(candidate: Mapping[str, float]) -> float:
                nll = 0.0
                for client, (scores, labels) in validation.items():
                    if scope == "client":
                        prior = prediction.prior_from_counts(f.label_counts[client])
                        log_p = self.pooled(candidate, scores, state.correlation[client])
                        log_p = self.for_prior(log_p, prior)
                    else:
                        # Validation has the seen clients' label mix.
                        log_p = self.pooled(candidate, scores)
                        log_p = prediction.reweight(log_p, f.label_prior, self.pooled_prior)
                    nll -= float(log_p[np.arange(len(labels)), labels].sum())
                return nll

            return total

        fitted: dict[str, float] = {}
        for scope in ("global", "client"):
            grids = {name: values for name, (_, values) in self.grids().items()}
            if scope == "global":
                grids.pop("correlation", None)
            # Not from the last fit: calibrating twice must change nothing.
            start = {name: value for name, (value, _) in self.grids().items()}
            best = prediction.coordinate_search(loss(scope), start, grids)
            fitted |= {f"{scope}.{name}": value for name, value in best.items()}
        return replace(state, calibration=fitted)

    @property
    def uniform(self) -> NDArray[np.float64]:
        """[C] the uniform label prior."""
        return np.full(self.federation.classes, 1.0 / self.federation.classes)

    def pooled(
        self,
        calibration: Mapping[str, float],
        scores: Scores,
        correlation: NDArray[np.float64] | None = None,
    ) -> Log:
        """[n, C] log probabilities under `pooled_prior`.

        Mixture of experts by the gate and the client's correlation, where there are any, pooled
        with the coordination head.
        """
        experts = prediction.log_posterior(scores.experts, calibration.get("experts", 1.0))
        experts = prediction.reweight(experts, self.pooled_prior, self.trained_prior)
        weights = np.zeros(self.experts)
        if correlation is not None:
            log_c = np.log(np.maximum(correlation, 1e-300))
            weights = weights + calibration.get("correlation", 1.0) * log_c
        if scores.gate is not None:
            weights = weights + calibration["gate"] * scores.gate
        log_p = prediction.mixture(experts, log_softmax(weights, axis=-1))
        if scores.head is None:
            return log_p
        head = prediction.log_posterior(scores.head, calibration["head_sharpness"])
        head = prediction.reweight(head, self.pooled_prior, self.head_prior)
        return prediction.interpolate(log_p, head, calibration["head"])

    def for_prior(self, log_p: Log, prior: NDArray[np.float64] | None) -> Log:
        """What `pooled` gives, reweighted to a client's label prior [C] where that is on."""
        if prior is None or not self.settings.reweighting:
            return log_p
        return prediction.reweight(log_p, prior, self.pooled_prior)

    def log_gate(self, state: ServerState, scores: Scores) -> Log:
        """[n, M] log g(x): uniform without a gate."""
        count, experts = scores.experts.shape[1], self.experts
        return np.full((count, experts), -np.log(experts))

    def mean_gate(self, state: ServerState, scores: Scores) -> NDArray[np.float64]:
        """[M] mean of the gate over a client's inputs."""
        return np.asarray(np.exp(self.log_gate(state, scores)).mean(axis=0))

    def predict_global(self, state: ServerState, scores: Scores) -> Log:
        """[n, C] log probabilities, knowing nothing about the client."""
        if self.coordinates:
            return self.pooled(self.calibration(state, "global"), scores)
        return self.mixture(scores, np.full(self.experts, 1.0 / self.experts))

    def mixture(self, scores: Scores, weights: NDArray[np.float64]) -> Log:
        """[n, C] log probabilities of the experts, weighted by [M]."""
        experts = prediction.log_posterior(scores.experts)
        return prediction.mixture(experts, np.log(np.maximum(weights, 1e-300)))

    def predict_with(
        self,
        state: ServerState,
        scores: Scores,
        prior: NDArray[np.float64] | None,
        correlation: NDArray[np.float64] | None,
    ) -> Log:
        """Experts weighted by a client's correlation [M], reweighted to its label prior [C]."""
        if self.coordinates:
            calibration = self.calibration(state, "client")
            return self.for_prior(self.pooled(calibration, scores, correlation), prior)
        if correlation is None:
            log_p = self.predict_global(state, scores)
        else:
            log_p = self.mixture(scores, correlation)
        if prior is None or not self.settings.reweighting:
            return log_p
        return prediction.reweight(log_p, prior, self.trained_prior)

    def predict_client(self, state: ServerState, client: int, scores: Scores, share: float) -> Log:
        """Personalized prediction; `share` is the personal expert's weight b_k."""
        prior = prediction.prior_from_counts(self.federation.label_counts[client])
        log_p = self.predict_with(state, scores, prior, state.correlation[client])
        if scores.personal is None:
            return log_p
        return prediction.blend(log_p, prediction.log_posterior(scores.personal), share)

    # Cold start: what each mode may read is in its arguments. No labels reach the first two.

    def correlation_unlabelled(self, state: ServerState, inputs: Scores) -> NDArray[np.float64]:
        """[M] correlation of a new client from its unlabelled inputs: unknown without a gate."""
        return np.full(self.experts, 1.0 / self.experts)

    def correlation_labelled(
        self, state: ServerState, inputs: Scores, labels: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """[M] correlation of a new client from labelled samples: uniform by default."""
        return np.full(self.experts, 1.0 / self.experts)

    def join_unlabelled(
        self, state: ServerState, inputs: Scores
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Label prior [C] by EM and correlation [M] of a new client, without labels."""
        correlation = self.correlation_unlabelled(state, inputs)
        if not self.settings.reweighting:
            return self.uniform, correlation
        log_p = self.predict_with(state, inputs, self.trained_prior, correlation)
        steps = self.federation.settings.cold_start.em_steps
        estimate = prediction.prior_by_em(log_p, self.trained_prior, steps)
        # As uncertain as counting that many labels: few images must not rule a class out.
        return prediction.prior_from_counts(len(log_p) * estimate), correlation

    def join_labelled(
        self, state: ServerState, inputs: Scores, labels: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Label prior [C] by counting and correlation [M] of a new client, with labels."""
        counts = np.bincount(labels, minlength=self.federation.classes)
        prior = prediction.prior_from_counts(counts)
        return prior, self.correlation_labelled(state, inputs, labels)

    # ------------------------------------------------------------- accounting

    def round_bytes(self, state: ServerState, orders: Sequence[Order]) -> tuple[int, int]:
        """Bytes (up, down) of a round's local training over all clients, in float32."""
        models = sum(len(order.experts) for order in orders)
        size = 4 * state.experts.shape[1]
        return models * (size + 4), models * size

    def gate_bytes(self, state: ServerState, clients: int, round_: int) -> tuple[int, int]:
        """Bytes (up, down) of the gate update after a round with this many clients."""
        size = 4 * state.experts.size
        return clients * message_bytes(self.design_width, self.federation.classes), clients * size

    @property
    def design_width(self) -> int:
        """Columns of the design matrix."""
        return self.columns(self.feature_width)

    @property
    def feature_width(self) -> int:
        """D, an expert's penultimate features."""
        f = self.federation
        return int(self.build(f.settings.model.name, f.shape, f.classes, 0).head.in_features)

    def columns(self, width: int) -> int:
        """`design_width`, given the number of an expert's features."""
        experts = min(self.gate_features or width, width) * self.experts
        return experts + patch_width(self.settings.patch_filters) + 1


def head_size(method: Method) -> int:
    """Parameters of an expert's head."""
    f = method.federation
    head = method.build(f.settings.model.name, f.shape, f.classes, 0).head
    return sum(p.numel() for p in head.parameters())


def add_at(result: LocalResult, expert: int, delta: Vector, weight: float) -> None:
    """Add one client's update of one expert to a shard's sums, once `Inbox` has admitted it.

    Raises:
        OverflowError: it is not finite or too large for the sums.
    """
    unit = np.zeros(len(result.weights.total))
    unit[expert] = 1.0
    ExactSum(result.updates.total[expert], result.updates.bits).add(delta, weight)
    result.weights.add(unit, weight)
    result.square_norms.add(unit, weight * square_norm(delta))
    result.valid += 1


def merged(results: Sequence[LocalResult]) -> LocalResult:
    """One shard's result for all shards'."""
    if len(results) == 1:
        return results[0]
    total = LocalResult.zeros(*results[0].updates.total.shape)
    for result in results:
        total.merge(result)
    return total


def drift(result: LocalResult) -> NDArray[np.float64]:
    """[M] weighted spread of client updates around their aggregate, relative to its length.

    sqrt(sum_k a ||d_k - d||^2) / ||d||, from sums alone; 0 for experts nobody trained.
    """
    weight = np.maximum(result.weights.value(), 1e-12)
    mean = result.updates.value() / weight[:, None]
    square = (mean**2).sum(axis=1)
    spread = np.maximum(result.square_norms.value() / weight - square, 0.0)
    return np.asarray(np.sqrt(spread / np.maximum(square, 1e-30)) * (square > 0))
