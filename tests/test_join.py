from dataclasses import replace

import numpy as np
import pytest

from fedcoe.bundle import Bundle, export_models, load_bundle
from fedcoe.cold_start import MODES, serve_clients
from fedcoe.engine.clients import TEST, TRAIN
from fedcoe.errors import FedCoEError
from fedcoe.join import halves, join
from fedcoe.methods.base import Scores


@pytest.fixture
def side_and_bundle(make_method, engine, train, tmp_path):
    method = make_method()
    state = replace(train(engine, method, 2), calibration={"global.gate": 3.0, "client.gate": 3.0})
    side = engine.run(lambda side: side)
    export_models(tmp_path / "models", method, state, side.personal)
    return side, load_bundle(tmp_path / "models", "fp32")


@pytest.fixture
def client(side_and_bundle):
    data = side_and_bundle[0].data
    return data.images(6, TRAIN), data.labels(6, TRAIN)


def test_labelled_inputs_give_the_prediction_that_the_evaluation_grades(side_and_bundle):
    side, bundle = side_and_bundle
    data = side.data
    [served] = serve_clients(side, bundle.method, bundle.state, [6])
    inputs, labels = data.images(6, TRAIN), data.labels(6, TRAIN)
    log_p = bundle.predict(data.images(6, TEST), "labels", inputs=inputs, labels=labels)
    truth = data.labels(6, TEST)
    assert (log_p.argmax(1) == truth).sum() == served.tallies["labels"].correct
    nll = -log_p[np.arange(len(truth)), truth].sum()
    assert nll == pytest.approx(served.tallies["labels"].nll, rel=1e-6)


def test_labelled_inputs_decide_the_correlation_and_counts_alone_do_not(side_and_bundle, client):
    _, bundle = side_and_bundle
    images, labels = client
    counts = np.bincount(labels, minlength=4)
    read = bundle.predict(images, "labels", labels=labels)
    counted = bundle.predict(images, "labels", label_counts=counts)
    scores = bundle.score(images)
    prior, correlation = bundle.method.join_labelled(bundle.state, scores, labels)
    np.testing.assert_array_equal(
        read, bundle.method.predict_with(bundle.state, scores, prior, correlation)
    )
    assert abs(read - counted).max() > 1e-6


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.zeros(3, np.int64), "not 2 integers"),
        (np.zeros(2), "not 2 integers"),
        (np.array([0, 4]), "0 to 3"),
        (np.array([-1, 0]), "0 to 3"),
    ],
)
def test_labels_that_do_not_fit_are_refused(side_and_bundle, labels, said):
    _, bundle = side_and_bundle
    images = np.zeros((2, 8, 8, 1), np.uint8)
    with pytest.raises(FedCoEError, match=said):
        bundle.predict(images, "labels", labels=labels)
    with pytest.raises(FedCoEError, match=said):
        join(bundle, images, labels)


def test_an_unknown_mode_is_refused(side_and_bundle):
    _, bundle = side_and_bundle
    with pytest.raises(FedCoEError, match=r"magic.*none, unlabelled, labels"):
        bundle.predict(np.zeros((2, 8, 8, 1), np.uint8), "magic")


def test_halves_part_every_class_evenly_and_cover_all_rows():
    labels = np.repeat([0, 1, 2], [7, 1, 10])
    first, second = halves(labels)
    assert sorted([*first, *second]) == list(range(18))
    counts = [np.bincount(labels[half], minlength=3) for half in (first, second)]
    assert (abs(counts[0] - counts[1]) <= 1).all()


def constant_scores(labels: np.ndarray, experts: int, classes: int) -> Scores:
    """Outputs that say nothing: whatever is right, is right by labels alone."""
    return Scores(np.zeros((experts, len(labels), classes), np.float32))


def test_mode_labels_is_not_graded_on_labels_it_has_read(side_and_bundle, monkeypatch):
    """Four images of four classes: who reads its own labels is better than chance, with outputs
    that say nothing; who reads the other half's is always wrong."""
    _, bundle = side_and_bundle
    labels = np.array([0, 1, 2, 3])
    monkeypatch.setattr(Bundle, "score", lambda self, images: constant_scores(labels, 2, 4))
    joined = join(bundle, np.zeros((4, 8, 8, 1), np.uint8), labels)
    assert joined.modes["labels"]["accuracy"] == 0.0
    assert set(joined.modes) == set(MODES)


def test_labels_change_nothing_in_the_modes_that_read_none(side_and_bundle, client):
    _, bundle = side_and_bundle
    images, labels = client
    for mode in ("none", "unlabelled"):
        blind, seeing = join(bundle, images, None, mode), join(bundle, images, labels, mode)
        assert blind.log_p.tobytes() == seeing.log_p.tobytes()
        assert blind.log_p.tobytes() == bundle.predict(images, mode).tobytes()
        np.testing.assert_array_equal(blind.class_mix, seeing.class_mix)
        assert blind.modes == {} and blind.label_mix is None


def test_the_answer_holds_fit_class_mix_predictions_and_every_modes_accuracy(
    side_and_bundle, client
):
    _, bundle = side_and_bundle
    images, labels = client
    joined = join(bundle, images, labels)
    assert joined.mode == "labels"
    assert joined.class_mix.sum() == pytest.approx(1)
    np.testing.assert_allclose(joined.label_mix, np.bincount(labels, minlength=4) / len(labels))
    logits = bundle.score(images).experts
    for row, mine in zip(joined.experts, logits, strict=True):
        assert row["accuracy"] == pytest.approx((mine.argmax(1) == labels).mean())
    assert sum(row["correlation"] for row in joined.experts) == pytest.approx(1)
    for mode in ("none", "unlabelled"):
        right = bundle.predict(images, mode).argmax(1) == labels
        assert joined.modes[mode]["accuracy"] == pytest.approx(right.mean())
    rows = joined.rows([str(i) for i in range(len(images))], "abcd")
    assert [row["class"] for row in rows] == ["abcd"[c] for c in joined.log_p.argmax(1)]
    assert [row["predicted"] for row in joined.class_rows("abcd")] == [
        sum(row["class"] == name for row in rows) for name in "abcd"
    ]


def test_what_cannot_be_asked_of_a_client_is_refused(side_and_bundle, make_method, tmp_path):
    side, bundle = side_and_bundle
    images = np.zeros((1, 8, 8, 1), np.uint8)
    with pytest.raises(FedCoEError, match="no labels"):
        join(bundle, images, None, "labels")
    with pytest.raises(FedCoEError, match="needs two images"):
        join(bundle, images, np.array([0]), "labels")
    assert "labels" not in join(bundle, images, np.array([0])).modes
    local = make_method(name="local")
    export_models(tmp_path / "local", local, local.init(), side.personal)
    with pytest.raises(FedCoEError, match="local trains no global model"):
        join(load_bundle(tmp_path / "local"), images)
