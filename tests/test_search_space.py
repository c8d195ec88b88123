"""What may be searched, and from a trial's parameters back to settings."""

from pathlib import Path

import pytest

from fedcoe.config import load_settings
from fedcoe.errors import FedCoEError
from fedcoe.search_space import Dimension, overlay, search_space, with_values

PARAMS = Path(__file__).parent.parent / "params.yaml"


def searched(space, *overrides):
    return search_space(load_settings(PARAMS, [f"tune.space={space}", *overrides]), "params.yaml")


@pytest.mark.parametrize(
    ("space", "dimension"),
    [
        ("{train.lr: {low: 1e-3, high: 1, log: true}}", Dimension((), 0.001, 1.0, True)),
        ("{train.momentum: {low: 0, high: 0.9, step: 0.3}}", Dimension((), 0.0, 0.9, False, 0.3)),
        ("{method.experts: {low: 2, high: 6}}", Dimension((), 2.0, 6.0, whole=True)),
        ("{method.gate: {choices: [analytic, neural]}}", Dimension(("analytic", "neural"))),
        ("{model.name: {choices: [cnn4, gn_cnn]}}", Dimension(("cnn4", "gn_cnn"))),
        ("{method.reweighting: {choices: [true, false]}}", Dimension((True, False))),
        # Fits some experts, though not those of the file.
        ("{method.experts_per_client: {low: 1, high: 8}}", Dimension((), 1.0, 8.0, whole=True)),
    ],
)
def test_numbers_whole_numbers_and_choices_can_be_searched(space, dimension):
    found, dropped = searched(space)
    assert list(found.values()) == [dimension]
    assert dropped == []


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ("{train.lr: {low: 0.1, high: 20}}", ["train.lr = 20", "less than or equal to 10"]),
        ("{train.lr: {low: 0, high: 1}}", ["train.lr = 0", "greater than 0"]),
        ("{train.momentum: {choices: [0.5, 1.0]}}", ["train.momentum = 1", "less than 1"]),
        ("{method.experts: {low: 1.5, high: 4}}", ["method.experts = 1.5", "integer"]),
        ("{method.experts: {low: 1, high: 4, step: 0.5}}", ["method.experts: step = 0.5"]),
        ("{method.gate: {choices: [analytic, magic]}}", ["method.gate = 'magic'", "'neural'"]),
        ("{method.gate: {low: 1, high: 2}}", ["method.gate", "no number", "choices"]),
        ("{model.name: {choices: [cnn5]}}", ["model.name = 'cnn5'", "cnn4"]),
        ("{train.roundz: {low: 1, high: 2}}", ["train.roundz", "no such setting", "lr"]),
        ("{method.expert: {low: 1, high: 2}}", ["method.expert:", "no such setting", "experts"]),
        ("{lr: {low: 1, high: 2}}", ["lr", "model, method, train"]),
        ("{partition.alpha: {low: 1, high: 2}}", ["partition.alpha", "model, method, train"]),
        ("{train.rounds: {low: 1, high: 2}}", ["train.rounds", "tune.rounds"]),
        ("{train.seed: {low: 1, high: 2}}", ["train.seed"]),
        ("{method.name: {choices: [fedavg]}}", ["method.name", "--method"]),
        ("{}", ["nothing to search"]),
    ],
)
def test_what_cannot_be_searched_is_named_with_value_and_what_is_allowed(space, said):
    with pytest.raises(FedCoEError) as caught:
        searched(space)
    message = str(caught.value)
    assert message.startswith("params.yaml: tune.space: ")
    assert "\n" not in message
    for words in said:
        assert words in message


def test_keys_that_only_other_methods_have_are_left_out():
    space = "{train.lr: {low: 0.01, high: 0.1}, method.experts: {low: 2, high: 6}}"
    found, dropped = searched(space, "method.name=fedavg")
    assert list(found) == ["train.lr"]
    assert dropped == ["method.experts"]
    with pytest.raises(FedCoEError, match=r"fedavg has none of method\.experts"):
        searched("{method.experts: {low: 2, high: 6}}", "method.name=fedavg")


def test_the_committed_space_fits_the_committed_method():
    found, dropped = search_space(load_settings(PARAMS))
    assert found and not dropped


def test_values_that_do_not_fit_together_are_one_error():
    with pytest.raises(FedCoEError, match="experts_per_client = 3: at most experts = 2"):
        with_values(load_settings(PARAMS), {"method.experts": 2, "method.experts_per_client": 3})


@pytest.mark.parametrize("own", [[], ["method.name=fedavg"], ["method.name=ditto", "train.seed=4"]])
def test_an_overlay_given_as_overrides_makes_the_settings_it_was_taken_from(own):
    settings = load_settings(PARAMS, own)
    params = {"train.lr": 0.0123456789, "method.server_momentum": 0.55, "model.name": "gn_cnn"}
    best = with_values(settings, params | {"method.reweighting": False})
    found = overlay(best, PARAMS)
    assert "runtime.workers" not in found
    again = load_settings(PARAMS, [f"{key}={value}" for key, value in found.items()])
    assert again == best
    assert overlay(load_settings(PARAMS), PARAMS) == {}
