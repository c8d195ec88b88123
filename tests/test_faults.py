"""What arrives is checked; simulated faults and attackers do what their settings say."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedcoe.config import FAULTS, MAX_NORM, FaultSettings, Settings, validate_settings
from fedcoe.engine.trainer import Trainer
from fedcoe.errors import FedCoEError
from fedcoe.faults import Faults, Inbox, Update, refuse_statistics
from fedcoe.methods.base import LocalResult, Order
from fedcoe.methods.settings import method_class, method_names, settings_for
from fedcoe.rounds import RoundPlan, finish_round, left_out, plan_round, train_round, update_gate

ROOT = Path(__file__).parent.parent
REASONS = {
    "dropout": "no answer",
    "timeout": "late",
    "nan": "not finite",
    "inf": "not finite",
    "wrong_shape": "wrong shape",
    "exploding": "too large",
    "stale": "stale",
    "duplicate": "duplicate",
}


def vector(*values):
    return np.array(values, np.float32)


@pytest.fixture
def inbox():
    """Round 3: client 4 was asked for experts 0 and 1, client 5 for expert 0; P = 2."""
    return Inbox({(4, 0): 0.5, (4, 1): 1.0, (5, 0): 0.5}, 3, 2)


@pytest.fixture
def faulty(make_federation):
    """faulty(method={...}, train={...}, **faults): a method whose clients have these faults."""

    def make(method=None, train=None, **faults):
        found = make_federation(
            method=method or {"name": "fedavg"},
            train={"quorum": 0.0} | (train or {}),
            faults=faults,
        )
        return method_class(found.settings.method.name)(found)

    return make


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (Update(4, 0, 3, vector(1, 2)), None),
        (Update(6, 0, 3, vector(1, 2)), "not asked"),
        (Update(5, 1, 3, vector(1, 2)), "not asked"),
        (Update(4, 0, 2, vector(1, 2)), "stale"),
        (Update(4, 0, 4, vector(1, 2)), "stale"),
        (Update(4, 0, 3, vector(1, 2), late=True), "late"),
        (Update(4, 0, 3, vector(1)), "wrong shape"),
        (Update(4, 0, 3, vector(1, 2, 3)), "wrong shape"),
        (Update(4, 0, 3, vector(1, 2)[:, None]), "wrong shape"),
        (Update(4, 0, 3, vector(1, np.nan)), "not finite"),
        (Update(4, 0, 3, vector(np.inf, 1)), "not finite"),
        (Update(4, 0, 3, vector(-np.inf, np.inf)), "not finite"),
        (Update(4, 0, 3, vector(MAX_NORM, 0)), "too large"),
        (Update(4, 0, 3, vector(MAX_NORM - 1, 0)), None),
        (Update(4, 0, 3, vector(3e38, 3e38)), "too large"),
    ],
)
def test_an_update_is_refused_for_the_first_thing_that_is_wrong_with_it(inbox, update, reason):
    assert inbox.refuse(update) == reason


def test_of_two_equal_updates_the_first_counts_and_other_experts_of_the_client_do_too(inbox):
    assert inbox.refuse(Update(4, 0, 3, vector(1, 2))) is None
    assert inbox.refuse(Update(4, 0, 3, vector(1, 2))) == "duplicate"
    assert inbox.refuse(Update(4, 1, 3, vector(1, 2))) is None
    assert inbox.refuse(Update(5, 0, 3, vector(1, 2))) is None


def test_a_broken_update_is_not_made_good_by_a_second_but_a_stale_one_is(inbox):
    assert inbox.refuse(Update(4, 0, 3, vector(1, np.nan))) == "not finite"
    assert inbox.refuse(Update(4, 0, 3, vector(1, 2))) == "duplicate"
    assert inbox.refuse(Update(5, 0, 2, vector(1, 2))) == "stale"
    assert inbox.refuse(Update(5, 0, 3, vector(1, 2))) is None


def test_what_was_asked_for_and_never_came_is_counted(inbox):
    assert inbox.unanswered == 3
    inbox.refuse(Update(4, 0, 2, vector(1, 2)))
    inbox.refuse(Update(6, 0, 3, vector(1, 2)))
    assert inbox.unanswered == 2


def test_a_lower_limit_on_the_norm_is_a_setting(make_method, engine):
    method = make_method(name="fedavg", train={"quorum": 0.0})
    state = method.init()
    plan = plan_round(method, state, engine)
    result = engine.run(method.local_train, state, plan.orders)
    norms = np.sqrt([float(d @ d) for d in deltas(method, engine, state, plan.orders).values()])
    limit = float(np.median(norms))
    tighter = make_method(name="fedavg", train={"quorum": 0.0, "max_update_norm": limit})
    found = engine.run(tighter.local_train, state, plan.orders)
    assert not result.dropped
    assert found.dropped == {"too large": int((norms >= limit).sum())}
    with pytest.raises(FedCoEError, match=r"train\.max_update_norm = 5000"):
        make_method(train={"max_update_norm": 5000})


def deltas(method, engine, state, orders):
    """Client to its honest update."""
    side = engine.run(lambda side: side)
    fits = [fit for order in orders for fit in method.fits(side, state, order)]
    trained = side.trainer.fit(fits, method.work(1), side.data)
    return {fit.client: result.vector - state.experts[fit.name] for fit, result in trained}


def test_weights_of_the_left_out_go_to_the_others_in_proportion(make_method):
    method = make_method(name="fedavg", train={"quorum": 0.5})
    state = method.init()
    parameters = state.experts.shape[1]
    orders = [Order(k, (0,), (w,)) for k, w in enumerate((0.5, 0.2, 0.3))]
    inbox, result = method.inbox(state, orders), LocalResult.zeros(1, parameters)
    for client, value in enumerate((1.0, np.nan, 3.0)):
        sent = np.full(parameters, value, np.float32)
        method.receive(inbox, result, Update(client, 0, 1, sent))
    after, record = finish_round(method, state, RoundPlan(1, orders, [orders]), [result])
    # (0.5 * 1 + 0.3 * 3) / (0.5 + 0.3)
    np.testing.assert_allclose(after.experts - state.experts, 1.75, atol=1e-6)
    assert record.dropped == {"not finite": 1}


# ---------------------------------------------------------- simulated faults


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "duplicate"])
def test_each_fault_leaves_every_update_out_under_its_reason(faulty, engine, fault):
    method = faulty(**{fault: 1.0})
    state = method.init()
    after, record = train_round(engine, method, state)
    assert record.dropped == {REASONS[fault]: 6}
    np.testing.assert_array_equal(after.experts, state.experts)
    expected = 0 if fault == "dropout" else method.federation.train_counts.sum()
    assert record.images == expected, "who drops out never starts"


def test_duplicates_count_once_and_change_no_bit(faulty, engine):
    plain, twice = faulty(), faulty(duplicate=1.0)
    state = plain.init()
    expected, record = train_round(engine, plain, state)
    after, doubled = train_round(engine, twice, state)
    assert doubled.dropped == {"duplicate": 6}
    assert after.experts.tobytes() == expected.experts.tobytes()
    assert (doubled.train_loss, doubled.drift) == (record.train_loss, record.drift)


def test_a_round_with_faults_is_the_round_of_the_clients_without(faulty, engine):
    mixed = dict.fromkeys((f for f in FAULTS if f != "duplicate"), 0.1)
    method, plain = faulty(**mixed), faulty()
    state = plain.init()
    orders = plain.dispatch(state, range(6))
    bad = {k: method.faults.of(1, k) for k in range(6)}
    good = [order for order in orders if bad[order.client] is None]
    assert 0 < len(good) < 6, "the seed must give some of either kind"
    found = engine.run(method.local_train, state, orders)
    expected = engine.run(plain.local_train, state, good)
    np.testing.assert_array_equal(found.updates.total, expected.updates.total)
    np.testing.assert_array_equal(found.weights.total, expected.weights.total)
    assert (found.samples, found.train_loss) == (expected.samples, expected.train_loss)
    assert found.dropped == Counter(REASONS[fault] for fault in bad.values() if fault)


def test_a_client_has_at_most_one_fault_as_often_as_the_settings_say():
    chances = dict(zip(FAULTS, (0.05, 0.1, 0.02, 0.03, 0.1, 0.1, 0.1, 0.2), strict=True))
    faults = Faults(FaultSettings(**chances), 0, 100)
    drawn = Counter(faults.of(round_, k) for round_ in range(1, 41) for k in range(100))
    for name, chance in (chances | {None: 0.3}).items():
        spread = np.sqrt(chance * (1 - chance) / 4000)
        assert abs(drawn[name] / 4000 - chance) < 4 * spread, name


def test_faults_depend_on_seed_round_and_client_alone():
    settings = FaultSettings(dropout=0.5)
    few, many, other = Faults(settings, 1, 6), Faults(settings, 1, 60), Faults(settings, 2, 6)

    def drawn(faults):
        return [faults.of(round_, k) for round_ in range(1, 20) for k in range(6)]

    assert drawn(few) == drawn(few) == drawn(many) != drawn(other)
    assert [few.of(1, k) for k in range(6)] != [few.of(2, k) for k in range(6)]


def test_probabilities_of_more_than_one_are_refused_in_one_line():
    with pytest.raises(FedCoEError, match=r"faults: probabilities of faults add up to 1.2") as e:
        validate_settings({"faults": {"nan": 0.6, "stale": 0.6}}, "params.yaml")
    assert "\n" not in str(e.value)
    with pytest.raises(FedCoEError, match=r"faults\.nan = 1\.5"):
        validate_settings({"faults": {"nan": 1.5}}, "params.yaml")


@pytest.mark.parametrize("name", method_names())
def test_every_method_goes_on_with_any_mixture_of_faults(faulty, make_engine, name):
    mixed = dict.fromkeys(FAULTS, 0.08) | {"attack": "sign_flip", "attackers": 0.34}
    method = faulty({"name": name}, **mixed)
    state, engine = method.init(), make_engine(build=method.build)
    for _ in range(2):
        state, record = train_round(engine, method, state)
        if method.coordinates:
            state = update_gate(engine, method, state, range(6))
    assert all(np.isfinite(a).all() for a in (state.experts, state.correlation))
    assert record.dropped or name in ("local", "centralized")


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["none", "norm_clip"])
def test_with_faults_one_worker_and_two_give_the_same_bytes(
    faulty, make_engine, train, aggregation
):
    mixed = dict.fromkeys(FAULTS, 0.06) | {"attack": "scale", "attack_statistics": True}
    method = faulty({"experts": 2, "experts_per_client": 2, "robust": aggregation}, **mixed)
    one, two = (train(make_engine(workers), method, 2) for workers in (1, 2))
    for name in ("experts", "momentum", "correlation", "dispatched", "personal_round"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes(), name
    assert {k: v.tobytes() for k, v in one.extra.items()} == {
        k: v.tobytes() for k, v in two.extra.items()
    }


def test_a_client_that_drops_out_keeps_its_personal_expert_and_a_late_one_trains_it(faulty, engine):
    gone, late = faulty({"experts": 2}, dropout=1.0), faulty({"experts": 2}, timeout=1.0)
    after, _ = train_round(engine, gone, gone.init())
    assert not after.personal_round.any()
    after, _ = train_round(engine, late, late.init())
    assert after.personal_round.all()
    np.testing.assert_array_equal(after.experts, late.init().experts)


def test_a_head_of_ones_own_is_kept_only_with_an_update_that_counts(faulty, make_engine):
    method = faulty({"name": "fedper"}, timeout=1.0)
    after, _ = train_round(make_engine(build=method.build), method, method.init())
    assert not after.personal_round.any()


def test_what_a_late_client_of_ifca_picked_is_not_known(faulty, make_engine):
    method = faulty({"name": "ifca", "experts": 2}, timeout=0.5)
    late = [k for k in range(6) if method.faults.of(1, k)]
    after, record = train_round(make_engine(), method, method.init())
    uniform = (after.correlation == 0.5).all(axis=1)
    assert list(np.flatnonzero(uniform)) == late
    assert record.dropped == {"late": len(late)}
    assert 0 < len(late) < 6


# ------------------------------------------------------------------ attackers


def test_attackers_are_the_same_in_every_round_and_as_many_as_asked_for():
    faults = Faults(FaultSettings(attack="scale", attackers=0.2), 3, 50)
    assert len(faults.attackers) == 10
    assert faults.attackers == Faults(FaultSettings(attack="sign_flip"), 3, 50).attackers
    assert faults.attackers != Faults(FaultSettings(attack="scale"), 4, 50).attackers
    assert not Faults(FaultSettings(attackers=0.2), 3, 50).attackers


@pytest.mark.parametrize(("attack", "factor"), [("sign_flip", -1.0), ("scale", -3.0)])
def test_attackers_send_a_multiple_of_their_updates_and_others_their_own(attack, factor):
    faults = Faults(FaultSettings(attack=attack, attackers=0.5, attack_scale=-3.0), 0, 4)
    for client in range(4):
        [sent] = faults.sent(Update(client, 0, 1, vector(1, -2)))
        expected = factor if client in faults.attackers else 1.0
        np.testing.assert_array_equal(sent.delta, vector(1, -2) * np.float32(expected))


def test_all_clients_flipping_signs_takes_the_round_the_other_way(faulty, engine):
    honest, attacked = faulty(), faulty(attack="sign_flip", attackers=1.0)
    state = honest.init()
    there, _ = train_round(engine, honest, state)
    back, _ = train_round(engine, attacked, state)
    np.testing.assert_allclose(
        back.experts - state.experts, state.experts - there.experts, atol=1e-6
    )


# -------------------------------------------------------------- gate messages


@pytest.mark.parametrize("method", [{"name": "fedavg", "coordination_head": True}, {"experts": 2}])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [("dropout", "no answer"), ("timeout", "late"), ("nan", "not finite"), ("inf", "not finite")],
)
def test_gate_messages_of_faulty_clients_are_left_out_by_reason(
    faulty, engine, method, fault, reason
):
    found = faulty(method, **{fault: 0.5})
    state = replace(found.init(), round=1)
    bad = {k for k in range(6) if found.faults.of(1, k)}
    assert 0 < len(bad) < 6
    message = engine.run(found.gate_message, state, range(6))
    assert message.dropped == {reason: len(bad)}
    good = engine.run(faulty(method).gate_message, state, sorted(set(range(6)) - bad))
    np.testing.assert_array_equal(message.statistics.gram.total, good.statistics.gram.total)
    np.testing.assert_array_equal(message.statistics.targets.total, good.statistics.targets.total)
    after = found.gate_update(state, [message])
    assert after.diagnostics["gate_messages_dropped"] == len(bad)


def test_statistics_that_no_samples_can_have_are_refused():
    design = np.ones((3, 2))
    shares = np.array([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    assert refuse_statistics(design, shares) is None
    assert refuse_statistics(design, np.ones((3, 2))) is None
    assert refuse_statistics(design, -shares) == "implausible"
    assert refuse_statistics(design, 10 * shares) == "implausible"
    assert refuse_statistics(design * np.nan, shares) == "not finite"
    assert refuse_statistics(design, np.full((3, 2), np.inf)) == "not finite"


@pytest.mark.parametrize(("attack", "dropped"), [("scale", 2), ("sign_flip", 0)])
def test_scaled_statistics_are_noticed_and_targets_turned_around_are_not(
    faulty, engine, attack, dropped
):
    settings = {"attack": attack, "attackers": 0.34, "attack_statistics": True}
    method, honest = faulty({"experts": 2}, **settings), faulty({"experts": 2})
    state = method.init()
    found = engine.run(method.gate_message, state, range(6))
    expected = engine.run(honest.gate_message, state, range(6))
    assert sum(found.dropped.values()) == dropped
    assert found.dropped["implausible"] == dropped
    assert (found.statistics.targets.total != expected.statistics.targets.total).any()


# ----------------------------------------------------- what is no client fault


@pytest.mark.parametrize(
    ("error", "seen"),
    [(ZeroDivisionError("a bug"), ZeroDivisionError), (MemoryError("one too many"), FedCoEError)],
)
def test_an_exception_is_never_counted_as_a_client_fault(
    make_method, engine, monkeypatch, error, seen
):
    real = Trainer._fit

    def failing(self, fit, *args):
        if fit.client == 3:
            raise error
        return real(self, fit, *args)

    monkeypatch.setattr(Trainer, "_fit", failing)
    method = make_method(name="fedavg", train={"quorum": 0.0})
    with pytest.raises(seen, match=str(error)):
        train_round(engine, method, method.init())


def test_an_unreadable_personal_expert_stops_the_round_and_names_the_file(make_method, engine):
    method = make_method(train={"quorum": 0.0})
    state, _ = train_round(engine, method, method.init())
    (engine.site.personal / "2-1.safetensors").write_bytes(b"rot")
    with pytest.raises(FedCoEError, match=r"2-1\.safetensors"):
        train_round(engine, method, state)


# ------------------------------------------------------------- what is said


def test_a_round_says_in_one_line_what_it_left_out(faulty, engine):
    method = faulty(timeout=0.5, train={"quorum": 0.0})
    plan = plan_round(method, method.init(), engine)
    late = sum(method.faults.of(1, k) is not None for k in range(6))
    results = [engine.run(method.local_train, method.init(), plan.orders)]
    _, record = finish_round(method, method.init(), plan, results)
    assert left_out(plan, record) == f"round 1: left out {late} late; asked for 6 updates"
    assert left_out(plan, replace(record, dropped={})) is None


def test_below_the_quorum_only_what_diverged_is_blamed_on_the_learning_rate(faulty, engine):
    for fault, blamed in (("dropout", False), ("exploding", True)):
        method = faulty(train={"quorum": 0.5}, **{fault: 1.0})
        with pytest.raises(FedCoEError, match="only 0 of 6 updates") as e:
            train_round(engine, method, method.init())
        assert ("train.lr" in str(e.value)) == blamed


def test_settings_that_cannot_matter_say_so(faulty):
    assert faulty().inert() == []
    [said] = faulty({"name": "local"}, nan=0.5).inert()
    assert said.startswith("faults: with local clients send no updates")
    for settings, what in (
        ({"attack": "scale", "attack_statistics": True}, "faults.attack_statistics: without"),
        ({"attack_statistics": True}, "faults.attack_statistics: attack = none"),
        ({"attack": "scale", "attackers": 0.01}, "faults.attack: attackers = 0.01 rounds to no"),
        ({"method": {"name": "centralized"}, "nan": 0.5}, "faults: with centralized clients send"),
        (
            {"method": {"name": "centralized"}, "attack": "scale"},
            "faults: with centralized clients",
        ),
    ):
        [said] = faulty(**settings).inert()
        assert said.startswith(what)


# -------------------------------------------------------------- fingerprints


def test_what_is_off_is_in_no_dump_and_moves_no_fingerprint():
    values = Settings().model_dump(mode="json")
    assert "faults" not in values
    assert "max_update_norm" not in values["train"]
    assert not {key for key in values["method"] if key.startswith("robust")}
    # As they were before there were faults, robust aggregation or a limit on norms.
    assert Settings().fingerprint("train") == "70bc19563fb3494b"
    # Of then: the ridge's default has changed since.
    then = Settings(method=settings_for({"ridge": 1e-3}))
    assert then.fingerprint("method") == "3b111bab979f834c"


@pytest.mark.parametrize(
    "change",
    [
        {"faults": {"nan": 0.1}},
        {"faults": {"attack": "scale"}},
        {"train": {"max_update_norm": 5.0}},
        {"method": {"robust": "median"}},
        {"method": {"robust_trim": 0.1}},
        {"method": {"robust_clip": 1.0}},
    ],
)
def test_what_is_on_moves_the_fingerprint_and_survives_a_dump(change):
    settings = validate_settings(change, "test")
    assert settings.fingerprint() != Settings().fingerprint()
    assert validate_settings(settings.model_dump(mode="json"), "test") == settings


@pytest.mark.slow
def test_committed_cells_are_still_those_their_keys_name():
    from flows.compare import Cell

    paths = sorted((ROOT / "results").glob("*/cells/*.json"))
    assert paths
    for path in paths:
        cell = json.loads(path.read_text())
        settings = validate_settings(cell["settings"], str(path))
        again = Cell(cell["method"], cell["row"], cell["seed"], settings, (), "")
        assert again.key(cell["data_hash"]) == cell["key"], path.name


@pytest.mark.parametrize(
    "change",
    [
        {"faults": {"nan": 0.1}},
        {"train": {"max_update_norm": 1.0}},
        {"privacy": {"epsilon": 2.0}},
    ],
)
def test_cells_with_and_without_faults_or_privacy_are_not_compared(change):
    from tasks.comparison import check_footing

    def cell(method, values):
        settings = validate_settings(values, "test").model_dump(mode="json")
        return {"method": method, "row": "all", "seed": 0, "data_hash": "x", "settings": settings}

    check_footing([cell("fedavg", {}), cell("fedprox", {})], Path("here"))
    with pytest.raises(FedCoEError, match="not on one footing"):
        check_footing([cell("fedavg", {}), cell("fedprox", change)], Path("here"))
