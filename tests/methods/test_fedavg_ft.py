from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from fedcoe.engine.trainer import Fit, LocalWork, Trainer
from fedcoe.evaluate import score_clients
from fedcoe.methods.base import Scores
from fedcoe.methods.settings import settings_for
from fedcoe.rounds import finetune, train_round

EPOCHS = 2
TRAIN = {"momentum": 0.9, "weight_decay": 0.0, "clip_norm": 0.0, "augment": "none"}


@pytest.fixture
def method(make_method):
    return make_method(name="fedavg_ft", finetune_epochs=EPOCHS)


def by_hand(side, state, client, epochs=EPOCHS):
    """The global model after some epochs of plain training on one client."""
    work = LocalWork(state.round, epochs, 16, 0.05, 0.9, 0.0, 0.0, "none", 0)
    [(_, result)] = side.trainer.fit([Fit(client, 0, state.experts[0])], work, side.data)
    return result.vector


@pytest.mark.parametrize("cohort", [1.0, 0.5])
def test_its_global_part_is_fedavg_bit_for_bit(make_method, make_engine, train, same_bytes, cohort):
    settings = {"train": {"cohort": cohort}, "server_momentum": 0.5}
    fedavg = train(make_engine(), make_method(name="fedavg", **settings), 4)
    tuned = train(make_engine(), make_method(name="fedavg_ft", finetune_epochs=1, **settings), 4)
    same_bytes(tuned, fedavg)
    assert tuned.personal_round.tolist() == [4] * 6


def test_a_personal_model_is_the_global_one_trained_on_for_some_epochs(make_method, engine, train):
    schedule = {"lr_schedule": "cosine", "rounds": 6}
    method = make_method(
        name="fedavg_ft", finetune_epochs=EPOCHS, balanced_softmax=True, train=TRAIN | schedule
    )
    state = train(engine, method, 4)
    side = engine.run(lambda side: side)
    assert method.work(4).lr < 0.03, "the schedule must have come down"
    for client in range(6):
        own = side.personal.load(client, 4)
        # Plain cross-entropy, at the peak learning rate.
        np.testing.assert_array_equal(own, by_hand(side, state, client))
        assert np.abs(own - state.experts[0]).max() > 1e-3


def test_clients_are_only_fine_tuned_when_an_evaluation_is_due(method, engine, train):
    state, found = None, []
    for _ in range(4):
        state = train(engine, method, 1, state)
        found.append(set(state.personal_round.tolist()))
    assert found == [{0}, {2}, {2}, {4}]
    files = {p.stem.split("-")[1] for p in engine.site.personal.iterdir()}
    assert files == {"2", "4"}


def test_the_epochs_are_those_of_the_setting(make_method, engine):
    side = engine.run(lambda side: side)
    for epochs in (1, 3):
        method = make_method(
            name="fedavg_ft", finetune_epochs=epochs, train=TRAIN | {"local_epochs": 7}
        )
        state, images = finetune(engine, method, replace(method.init(), round=2))
        assert images == epochs * method.federation.train_counts.sum()
        expected = by_hand(side, state, 3, epochs)
        np.testing.assert_array_equal(side.personal.load(3, 2), expected)


def test_methods_that_do_not_fine_tune_train_nothing(make_method, engine):
    method = make_method(name="fedavg")
    before = replace(method.init(), round=2)
    state, images = finetune(engine, method, before)
    assert state is before and images == 0
    assert not engine.site.personal.exists()


def test_the_number_of_workers_does_not_matter(method, make_engine):
    found = []
    for workers in (1, 3):
        engine = make_engine()
        engine.workers = workers
        state, images = finetune(engine, method, replace(method.init(), round=2))
        side = engine.run(lambda side: side)
        own = [side.personal.load(k, 2).tobytes() for k in range(6)]
        found.append((own, images, state.personal_round.tolist()))
    assert found[0] == found[1]


def test_a_model_that_is_not_finite_is_not_kept(method, engine, monkeypatch):
    real = Trainer._fit

    def broken(self, fit, *rest):
        result = real(self, fit, *rest)
        if fit.client == 2:
            result.vector[3] = np.nan
        return result

    monkeypatch.setattr(Trainer, "_fit", broken)
    start = replace(method.init(), round=2)
    state, images = finetune(engine, method, start)
    assert state.personal_round.tolist() == [2, 2, 0, 2, 2, 2]
    assert images == EPOCHS * method.federation.train_counts.sum()
    assert not (engine.site.personal / "2-2.safetensors").exists()
    assert not start.personal_round.any()


def test_the_personalized_prediction_is_the_fine_tuned_model_alone(method, two_rounds):
    found = two_rounds(method)
    np.testing.assert_array_equal(found.state.share, 1.0)
    p = np.array([[0.1, 0.7, 0.1, 0.1]], np.float32)
    scores = Scores(np.zeros((1, 1, 4), np.float32), personal=np.log(p))
    log_p = method.predict_client(found.state, 0, scores, float(found.state.share[0]))
    np.testing.assert_allclose(np.exp(log_p), p, rtol=1e-5)


def test_before_the_first_fine_tuning_a_client_gets_the_global_model(method, engine, train):
    state = train(engine, method, 1)
    for scores in engine.run(score_clients, method, state, range(6)):
        assert scores.test.personal is None
        np.testing.assert_array_equal(
            method.predict_client(state, scores.client, scores.test, 0.0),
            method.predict_global(state, scores.test),
        )


def test_a_client_that_no_cohort_included_is_fine_tuned_all_the_same(make_method, engine, train):
    method = make_method(name="fedavg_ft", finetune_epochs=1, train={"cohort": 0.3})
    state = train(engine, method, 2)
    assert (state.dispatched.sum(axis=1) == 0).any()
    assert state.personal_round.tolist() == [2] * 6


def test_a_new_client_gets_the_global_model(make_method, two_rounds):
    tuned = two_rounds(make_method(name="fedavg_ft", finetune_epochs=1))
    fedavg = two_rounds(make_method(name="fedavg"))
    assert tuned.cold_start == fedavg.cold_start
    assert tuned.evaluation.overall == fedavg.evaluation.overall
    assert tuned.evaluation.personalized != fedavg.evaluation.personalized


def test_a_round_costs_what_fedavgs_does(make_method, method, engine):
    fedavg = make_method(name="fedavg")
    state = method.init()
    size = 4 * state.experts.shape[1]
    orders = method.dispatch(state, [1, 4])
    assert method.round_bytes(state, orders) == (2 * (size + 4), 2 * size)
    records = [train_round(engine, m, state)[1] for m in (method, fedavg)]
    assert records[0] == records[1]


def test_it_runs_on_both_engines(method, runs_on_both_engines):
    assert runs_on_both_engines(method).state.personal_round.tolist() == [2] * 6


def test_its_settings_have_ranges():
    assert settings_for({"name": "fedavg_ft"}).finetune_epochs == 5
    with pytest.raises(ValidationError, match="finetune_epochs"):
        settings_for({"name": "fedavg_ft", "finetune_epochs": 0})
