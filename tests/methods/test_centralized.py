from dataclasses import replace

import numpy as np
import pytest

from fedcoe.engine.trainer import Fit
from fedcoe.prediction import prior_from_counts


@pytest.fixture
def method(make_method):
    return make_method(name="centralized")


def test_a_round_is_one_fit_on_everybody_s_data_in_the_order_of_clients(
    method, side, engine, train
):
    start = method.init().experts[0]
    images, labels = (
        np.concatenate(parts) for parts in zip(*map(side.data.train, range(6)), strict=True)
    )
    expected = side.trainer._fit(Fit(0, 0, start), method.work(1), images, labels)
    state = train(engine, method, 1)
    # The server adds the update to the start, and both are rounded.
    np.testing.assert_allclose(state.experts[0], expected.vector, atol=1e-6)
    assert expected.images == method.federation.train_counts.sum()


def test_it_sees_as_many_images_as_fedavg_also_with_cohorts(make_method, make_engine):
    for cohort in (1.0, 0.5):
        images = []
        for name in ("fedavg", "centralized"):
            method = make_method(name=name, train={"cohort": cohort})
            state = method.init()
            side = make_engine().run(lambda side: side)
            orders = method.dispatch(state, method.cohort(state))
            images.append(method.local_train(side, state, orders).images)
        assert images[0] == images[1] > 0


def test_balanced_softmax_takes_the_label_prior_of_the_pool(make_method):
    assert make_method(name="centralized").logit_shift(0) is None
    method = make_method(name="centralized", balanced_softmax=True)
    pool = prior_from_counts(method.federation.label_counts.sum(axis=0))
    np.testing.assert_allclose(method.logit_shift(3), np.log(pool), rtol=1e-6)


def test_nothing_is_counted_as_communicated(method):
    state = method.init()
    assert method.round_bytes(state, method.dispatch(state, range(6))) == (0, 0)


def test_with_cohorts_the_images_are_drawn_from_everybody_and_others_each_round(make_method, side):
    method = make_method(name="centralized", train={"cohort": 0.3})
    state, drawn = method.init(), []
    trainer = side.trainer

    class Spy:
        def fit(self, fits, work, data):
            drawn.append(data.rows)
            return trainer.fit(fits, work, data)

    for round_ in (0, 1):
        later = replace(state, round=round_)
        orders = method.dispatch(later, method.cohort(later))
        method.local_train(replace(side, trainer=Spy()), later, orders)
    ends = np.cumsum(method.federation.train_counts)
    assert len(set(np.searchsorted(ends, drawn[0], side="right"))) > 2
    assert len(np.unique(drawn[0])) == len(drawn[0])
    assert not np.array_equal(drawn[0], drawn[1])


def test_it_runs_on_both_engines_on_images_of_all_clients(make_method, runs_on_both_engines):
    runs_on_both_engines(make_method(name="centralized", train={"cohort": 0.5}))


def test_no_simulated_fault_concerns_it(make_federation, make_engine, train, method):
    faults = {"dropout": 0.6, "attack": "sign_flip", "attackers": 1.0}
    federation = make_federation(method={"name": "centralized"}, faults=faults)
    faulty = train(make_engine(), type(method)(federation), 2)
    assert faulty.experts.tobytes() == train(make_engine(), method, 2).experts.tobytes()
