"""Which rounds of a method are a trunk, and going on from one."""

from dataclasses import replace

import numpy as np
import pytest

from fedcoe.methods.settings import method_class, method_names
from fedcoe.rounds import train_round
from fedcoe.trunk import cut, onward, trunk_settings

POOL = {"experts": 3, "branch_after": 2, "personal_epochs": 1, "server_momentum": 0.7}


def test_only_methods_that_are_fedavg_for_a_while_have_a_trunk(make_method):
    train = {"rounds": 5}
    found = {name: make_method(name=name, train=train).trunk_rounds for name in method_names()}
    assert {name for name, rounds in found.items() if rounds} == {"fedavg", "fedavg_ft"}
    assert found["fedavg"] == found["fedavg_ft"] == 5


@pytest.mark.parametrize(
    ("changes", "rounds"),
    [
        ({}, 2),
        ({"branch_after": 0}, 0),
        ({"branch_after": 9}, 5),
        ({"experts": 1}, 5),
        ({"personal_epochs": 0}, 0),
        ({"personal_epochs": 0, "personal_expert": False}, 2),
        ({"similarity": "updates"}, 0),
        ({"gate": "neural", "coordination_head": False}, 0),
        ({"gate_before_aggregation": True}, 0),
    ],
)
def test_a_pool_has_one_until_it_branches_if_nothing_else_is_trained_or_learned(
    make_method, changes, rounds
):
    assert make_method(**POOL | changes, train={"rounds": 5}).trunk_rounds == rounds


def test_a_private_method_has_none(make_federation):
    privacy = {"epsilon": 8.0, "delta": 0.01}
    for method in ({"name": "fedavg"}, POOL):
        federation = make_federation(method=method, privacy=privacy)
        name = federation.settings.method.name
        assert method_class(name)(federation).trunk_rounds == 0


def test_a_pool_goes_on_from_fedavgs_round_as_from_its_own(make_method, engine, same_bytes):
    options = {"train": {"rounds": 5, "cohort": 0.5}, "balanced_softmax": True}
    fedavg = make_method(name="fedavg", server_momentum=0.7, **options)
    pool = make_method(**POOL, **options)
    assert trunk_settings(fedavg.federation.settings) == trunk_settings(pool.federation.settings)
    records, own = [], []
    one, several = fedavg.init(), pool.init()
    for _ in range(2):
        one, record = train_round(engine, fedavg, one)
        records.append(record)
        several, record = train_round(engine, pool, several)
        own.append(record)
    there, between = onward(pool, pool.init(), cut(one), records)
    same_bytes(there, several)
    assert between == own
    start = replace(pool.init(), round=1)
    assert [r.round for r in onward(pool, start, cut(one), records)[1]] == [2]
    # What follows is equal too.
    same_bytes(*(train_round(engine, pool, state)[0] for state in (there, several)))
    back, between = onward(fedavg, fedavg.init(), cut(several), own)
    same_bytes(back, one)
    assert between == records
    assert np.array_equal(back.correlation, np.ones_like(back.correlation))


@pytest.mark.parametrize(
    "other",
    [
        {"method": {"balanced_softmax": True}}, {"method": {"server_momentum": 0.5}},
        {"method": {"robust": "median"}}, {"train": {"lr": 0.01}}, {"partition": {"alpha": 0.7}},
        {"faults": {"dropout": 0.1}},
    ],
)  # fmt: skip
def test_what_decides_training_decides_the_trunk(make_federation, other):
    def of(method=None, **sections):
        method = {"name": "fedavg"} | (method or {})
        return trunk_settings(make_federation(method=method, **sections).settings)

    assert of() != of(**other)
    predicts = {"coordination_head": True, "reweighting": True, "ridge": 0.1, "patch_filters": 4}
    predicts |= {"balanced_head": True}
    assert of() == of(predicts) == of(evaluate={"every": 2}, runtime={"workers": 2})
