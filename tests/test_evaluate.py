from dataclasses import asdict, replace

import numpy as np
import pytest

from fedcoe.engine.clients import TEST, VALIDATION
from fedcoe.evaluate import ClientScores, evaluate, join_scores, score_clients, score_global
from fedcoe.methods.base import Scores

SEEN = range(6)


def logits(labels, right=4.0, confidence=1.0):
    """[n, 4] logits that favour the labels (right > 0) or their neighbours."""
    wanted = labels if right > 0 else (labels + 1) % 4
    return (abs(right) * confidence * np.eye(4)[wanted]).astype(np.float32)


def client(k, good=10, bad=0, personal=None):
    """A client whose model is right on `good` and wrong on `bad` images, both splits alike."""
    labels = np.arange(good + bad) % 4
    z = np.concatenate([logits(labels[:good]), logits(labels[good:], -4.0)])
    own = None if personal is None else logits(labels, personal)
    scores = Scores(z[None], personal=own)
    return ClientScores(k, scores, labels, scores, labels)


@pytest.fixture
def fedavg(make_method):
    return make_method(name="fedavg")


def run(method, clients, right=3, wrong=1):
    labels = np.zeros(right + wrong, np.int64)
    z = np.concatenate([logits(labels[:right]), logits(labels[right:], -4.0)])
    return evaluate(method, method.init(), clients, Scores(z[None]), labels)


def test_figures_are_those_of_test_images_by_hand(fedavg):
    clients = [client(k, 10 - k, k) for k in SEEN]
    _, found = run(fedavg, clients)
    p = np.exp(4) / (np.exp(4) + 3)
    assert found.overall["accuracy"] == 0.75
    assert found.overall["nll"] == pytest.approx(-(3 * np.log(p) + np.log((1 - p) / 3)) / 4)
    assert found.overall["ece"] == pytest.approx(abs(p - 0.75))
    assert found.personalized["accuracy"] == pytest.approx(1 - 15 / 60)
    assert found.personalized["worst10"] == pytest.approx(0.5)
    assert found.validation["personalized_accuracy"] == pytest.approx(0.75)
    assert found.validation["global_accuracy"] == pytest.approx(0.75)
    assert [row["accuracy"] for row in found.clients] == pytest.approx(
        [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    )


def test_the_order_in_which_clients_come_does_not_matter(fedavg):
    clients = [client(k, 10 - k, k, personal=4.0) for k in SEEN]
    a, b = run(fedavg, clients), run(fedavg, clients[::-1])
    np.testing.assert_equal(asdict(a[1]), asdict(b[1]))
    assert a[0].share.tobytes() == b[0].share.tobytes()


def test_a_personal_expert_gets_the_share_it_earns_on_validation(fedavg):
    clients = [
        client(0, 4, 6, personal=9.0),  # much better than the model
        client(1, 10, 0, personal=-9.0),  # much worse
        client(2, 10, 0),  # none
        client(3, 10, 0, personal=4.0),  # the same: the smallest share wins
        *(client(k) for k in (4, 5)),
    ]
    state, found = run(fedavg, clients)
    np.testing.assert_allclose(state.share, [1.0, 0, 0, 0, 0, 0])
    assert found.clients[0]["accuracy"] == 1.0
    assert found.clients[0]["accuracy_global"] == pytest.approx(0.4)
    assert [row["personal_share"] for row in found.clients] == state.share.tolist()


@pytest.mark.parametrize(("blend", "shares"), [(False, [1, 1, 1]), (True, [1, 0, 0])])
def test_own_models_count_alone_unless_they_are_to_be_blended(make_method, blend, shares):
    clients = [
        client(0, 4, 6, personal=9.0),  # much better than the global model
        client(1, 10, 0, personal=-9.0),  # much worse
        client(2, 10, 0, personal=-9.0),
    ]
    state, found = run(make_method(name="ditto", blend=blend), clients)
    np.testing.assert_allclose(state.share[:3], shares)
    assert [row["accuracy"] for row in found.clients] == ([1, 1, 1] if blend else [1, 0, 0])


def test_shares_are_chosen_on_validation_and_never_on_test(fedavg):
    good, bad = client(0, 10, personal=-9.0), client(0, 0, 10, personal=9.0)
    mixed = replace(
        good, test=bad.test, test_labels=bad.test_labels
    )  # validation says 0, test would say 1
    state, found = run(fedavg, [mixed, *(client(k) for k in range(1, 6))])
    assert state.share[0] == 0.0
    assert found.clients[0]["accuracy"] == 0.0
    assert found.validation["personalized_accuracy"] == 1.0


def test_evaluation_leaves_experts_and_correlation_alone(fedavg):
    state, _ = run(fedavg, [client(k) for k in SEEN])
    np.testing.assert_array_equal(state.experts, fedavg.init().experts)
    np.testing.assert_array_equal(state.correlation, fedavg.init().correlation)


def test_tables_have_a_row_a_client_and_a_row_an_expert(make_method):
    method = make_method(experts=2)
    c = np.array([[0.9, 0.1]] * 4 + [[0.2, 0.8]] * 2)
    dispatched = np.array([[3, 0]] * 4 + [[1, 2]] * 2)
    state = replace(method.init(), correlation=c, dispatched=dispatched)

    def two(labels):
        return Scores(np.stack([logits(labels), logits(labels, -4.0)]))

    labels = np.array([0, 1, 2, 0])
    clients = [ClientScores(k, two(labels), labels, two(labels), labels) for k in SEEN]
    state, found = evaluate(method, state, clients, two(labels), labels)
    assert [row["client"] for row in found.clients] == list(method.federation.names)
    row = found.clients[5]
    assert (row["correlation_0"], row["correlation_1"]) == (0.2, 0.8)
    assert row["gate_0"] == row["gate_1"] == pytest.approx(0.5)  # without a gate: uniform
    assert (row["expert_accuracy_0"], row["expert_accuracy_1"]) == (1.0, 0.0)
    assert row["samples"] == method.federation.train_counts[5]
    first, second = found.experts
    assert (first["expert"], first["clients"], second["clients"]) == (0, 4, 2)
    assert (first["load"], second["load"]) == (14 / 18, 4 / 18)
    assert (first["accuracy"], second["accuracy"]) == (1.0, 0.0)
    names = method.federation.class_names
    assert [first[f"accuracy_class_{n}"] for n in names[:3]] == [1.0, 1.0, 1.0]
    assert np.isnan(first[f"accuracy_class_{names[3]}"])
    assert set(state.calibration) >= {"global.gate", "client.correlation"}


def test_every_client_is_scored_on_its_own_validation_and_test_images(
    make_method, engine, train, side
):
    # Batches of several clients, cut apart again.
    for batch in (1, 30, 1000):
        method = make_method(evaluate={"batch_size": batch})
        state = train(engine, method, 1)
        found = score_clients(side, method, state, [4, 0, 2])
        assert sorted(c.client for c in found) == [0, 2, 4]
        for c in found:
            for scores, labels, split in (
                (c.validation, c.validation_labels, VALIDATION),
                (c.test, c.test_labels, TEST),
            ):
                images = side.data.images(c.client, split)
                np.testing.assert_array_equal(labels, side.data.labels(c.client, split))
                for m in range(2):
                    expected, _ = side.trainer.outputs(state.experts[m], images, 100)
                    np.testing.assert_allclose(scores.experts[m], expected, atol=1e-4)
                own, _ = side.trainer.outputs(side.personal.load(c.client, 1), images, 100)
                np.testing.assert_allclose(scores.personal, own, atol=1e-4)


def test_clients_without_a_personal_expert_have_no_personal_scores(make_method, side):
    method = make_method()
    [found] = score_clients(side, method, method.init(), [3])
    assert found.validation.personal is None
    assert found.test.personal is None


def test_scores_of_several_workers_are_joined_in_order(make_method, engine, train, side):
    method = make_method()
    state = train(engine, method, 2)
    rows = np.arange(48)
    whole = score_global(side, method, state, rows)
    parts = [score_global(side, method, state, part) for part in np.array_split(rows, 3)]
    joined = join_scores(parts)
    for name in ("experts", "gate", "head"):
        a, b = getattr(whole, name), getattr(joined, name)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert joined.personal is None
