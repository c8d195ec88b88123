from dataclasses import replace

import numpy as np
import pytest

from fedcoe.engine.clients import TRAIN, VALIDATION
from fedcoe.errors import FedCoEError
from fedcoe.release import (
    FIGURES,
    Difference,
    Graded,
    compare,
    grade_clients,
    interval,
    promotes,
)


def hits(right: int, count: int) -> np.ndarray:
    return np.arange(count) < right


def graded(**figures: np.ndarray) -> list[Graded]:
    return [Graded(0, figures)]


def test_the_interval_of_many_images_is_the_normal_one_of_paired_changes():
    """900 images: 50 lost, 110 gained. Mean 60/900, variance 160/900 - (60/900)^2."""
    change = np.repeat([-1, 0, 1], [50, 740, 110])
    mean, error = 60 / 900, np.sqrt((160 / 900 - (60 / 900) ** 2) / 900)
    low, high = interval([change])
    assert low == pytest.approx(mean - 1.96 * error, abs=0.0015)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.0015)


def test_what_always_changes_the_same_way_within_clients_has_no_spread():
    """Clients are fixed: one gains everywhere, one loses everywhere, whatever is drawn."""
    assert interval([np.ones(30, int), -np.ones(10, int)]) == (0.5, 0.5)
    assert interval([np.zeros(5, int)]) == (0.0, 0.0)


def test_one_image_that_may_or_may_not_be_drawn():
    """Two images, one gained: drawn 0, 1 or 2 times with chances 1/4, 1/2, 1/4."""
    assert interval([np.array([1, 0])]) == (0.0, 1.0)


def test_changes_are_paired_image_by_image():
    """Equal accuracies of 50 %: the same images right means no spread, others much."""
    first = hits(50, 100)
    [same] = compare(graded(new_none=first), graded(new_none=first))
    [other] = compare(graded(new_none=first), graded(new_none=~first))
    assert (same.champion, same.candidate, same.low, same.high) == (0.5, 0.5, 0.0, 0.0)
    assert other.low < -0.15 and other.high > 0.15


def test_figures_weigh_images_of_all_clients_alike_in_any_order():
    champion = [Graded(1, {"new_none": hits(1, 10)}), Graded(0, {"new_none": hits(30, 30)})]
    candidate = [Graded(0, {"new_none": hits(30, 30)}), Graded(1, {"new_none": hits(9, 10)})]
    [found] = compare(champion, candidate)
    assert (found.images, found.champion, found.candidate) == (40, 31 / 40, 39 / 40)


def difference(low: float, high: float) -> Difference:
    return Difference("new_none", 10, 0.5, 0.5, low, high)


RISE, FALL, SAME = difference(0.01, 0.2), difference(-0.2, -0.01), difference(-0.1, 0.1)


@pytest.mark.parametrize(
    ("differences", "promoted"),
    [
        ([RISE, SAME], True),
        ([RISE, RISE], True),
        ([RISE, FALL], False),
        ([SAME, SAME], False),
        ([FALL], False),
        ([difference(0.0, 0.0)], False),
        ([difference(0.0, 0.2), SAME], False),
        ([RISE, difference(-0.2, 0.0)], True),
    ],
)
def test_promotion_takes_a_rise_and_no_fall(differences, promoted):
    assert promotes(differences) is promoted


def test_nothing_to_compare_on_is_an_error():
    with pytest.raises(FedCoEError, match="no validation image and no new client"):
        compare(graded(), graded())


def test_clients_are_graded_on_validation_images(make_method, engine, side, train):
    method = make_method()
    state = train(engine, method, 2)
    seen, new = grade_clients(side, method, state, [0, 6])
    assert set(seen.hits) == {name for name in FIGURES if name.startswith("validation")}
    assert set(new.hits) == {name for name in FIGURES if name.startswith("new")}
    images, labels = side.data.images(6, VALIDATION), side.data.labels(6, VALIDATION)
    none = method.predict_global(state, method.score(side.trainer, state, images))
    np.testing.assert_array_equal(new.hits["new_none"], none.argmax(1) == labels)
    assert side.data.labels(6, TRAIN).size


def test_a_candidate_made_worse_on_purpose_is_refused_and_the_trained_one_promoted(
    make_method, engine, side, train
):
    method = make_method()
    trained = train(engine, method, 4)
    noise = np.random.default_rng(0).standard_normal(trained.experts.shape)
    spoilt = replace(trained, experts=(trained.experts + noise).astype(np.float32), extra={})
    good, bad = (grade_clients(side, method, state, range(8)) for state in (trained, spoilt))
    assert promotes(compare(bad, good))
    assert not promotes(compare(good, bad))
    assert not promotes(compare(good, good))
