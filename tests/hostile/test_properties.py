"""Whatever dictionary becomes settings and whatever data is dealt: rules that always hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from fedcoe.config import PartitionSettings, Settings, load_settings, validate_settings
from fedcoe.data.partition import (
    TEST,
    TRAIN,
    VALIDATION,
    Partition,
    load_partition,
    make_partition,
    save_partition,
)
from fedcoe.errors import FedCoEError
from fedcoe.methods.settings import method_names

QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

DEFAULTS = Settings().model_dump(mode="json")
KEYS = sorted({key for section in DEFAULTS.values() for key in section})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.binary(max_size=4),
    st.sampled_from(["fedcoe", "fedavg", "natural", "cnn4", "", "auto", *method_names()]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=6,
)
SECTIONS = st.dictionaries(
    st.sampled_from([*DEFAULTS, "tune", "other"]) | SCALARS,
    VALUES
    | (st.dictionaries(st.sampled_from([*KEYS, "name", "space", "choices"]), VALUES, max_size=4)),
    max_size=4,
)


def result_or_error(call: Callable[[], Any]) -> tuple[Any, str]:
    try:
        return call(), ""
    except FedCoEError as error:
        return None, str(error)


@QUICK
@given(SECTIONS)
def test_any_dictionary_is_settings_or_one_line(values: dict[Any, Any]) -> None:
    found, said = result_or_error(lambda: validate_settings(values, "params.yaml"))
    if found is None:
        assert said.isprintable() and "params.yaml: " in said
    else:
        again = validate_settings(json.loads(found.model_dump_json()), "again")
        assert again.fingerprint() == found.fingerprint()


@QUICK
@given(st.text(max_size=60) | st.text("{}[]:,-&*!|>%@`'\"#? \n\tabx0.~<", max_size=60))
def test_any_text_is_a_parameter_file_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "params.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (lambda: load_settings(path), lambda: load_settings("none", [text])):
        assert "\n" not in result_or_error(read)[1]


RIGHT = {
    ("train", "lr"): st.floats(1e-6, 10),
    ("train", "rounds"): st.integers(1, 100_000),
    ("train", "cohort"): st.floats(0.001, 1),
    ("train", "seed"): st.integers(0, 2**32 - 1),
    ("partition", "alpha"): st.floats(1e-3, 1e6),
    ("partition", "clients"): st.integers(4, 10_000),
    ("method", "name"): st.sampled_from(sorted(method_names())),
    ("method", "server_lr"): st.floats(0.01, 2),
    ("data", "name"): st.text(min_size=1, max_size=10).filter(str.isprintable),
}


@QUICK
@given(st.fixed_dictionaries({}, optional=RIGHT))
def test_settings_survive_being_written_as_yaml(
    tmp_path_factory: pytest.TempPathFactory, values: dict[tuple[str, str], Any]
) -> None:
    sections: dict[str, dict[str, Any]] = {}
    for (section, key), value in values.items():
        sections.setdefault(section, {})[key] = value
    found = validate_settings(sections, "given")
    path = tmp_path_factory.getbasetemp() / "params.yaml"
    YAML(typ="safe").dump(found.model_dump(mode="json"), path)
    again = load_settings(path)
    assert again == found and again.fingerprint() == found.fingerprint()


@st.composite
def deals(draw: st.DrawFn) -> tuple[PartitionSettings, np.ndarray[Any, Any], int]:
    """Partition settings, labels and their number of classes."""
    classes = draw(st.integers(2, 12))
    size = draw(st.integers(1, 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights = rng.dirichlet(np.full(classes, draw(st.sampled_from([0.2, 1.0, 100.0]))))
    skew = draw(st.sampled_from(["none", "rotation", "inversion", "blur"]))
    values = {
        "scheme": draw(st.sampled_from(["dirichlet", "pathological", "iid"])),
        "clients": draw(st.integers(2, 30)),
        "new_clients": draw(st.sampled_from([0.0, 0.1, 0.25, 0.4])),
        "alpha": draw(st.floats(0.01, 1000)),
        "classes_per_client": draw(st.integers(1, 12)),
        "min_samples": draw(st.integers(4, 12)),
        "feature_skew": skew,
        "feature_groups": 2 if skew == "inversion" else draw(st.integers(2, 4)),
        "new_clients_by": draw(st.sampled_from(["random", "label_mix"])),
        "validation": draw(st.sampled_from([0.05, 0.15, 0.4])),
        "test": draw(st.sampled_from([0.05, 0.25, 0.5])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }
    return PartitionSettings(**values), rng.choice(classes, size, p=weights), classes


@QUICK
@given(deals())
def test_every_deal_gives_every_sample_once_or_says_in_one_line_why_not(
    tmp_path_factory: pytest.TempPathFactory,
    deal: tuple[PartitionSettings, np.ndarray[Any, Any], int],
) -> None:
    asked, labels, classes = deal
    made, said = result_or_error(lambda: make_partition(asked, labels, 20, classes))
    if made is None:
        assert "partition." in said and "\n" not in said
        return
    rows = [
        made.indices(client, split)
        for client in range(made.clients)
        for split in (TRAIN, VALIDATION, TEST)
    ]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(labels)))
    assert min(map(len, rows)) >= 1
    sizes = np.bincount(made.client, minlength=asked.clients)
    least = 4 if asked.scheme == "pathological" else asked.min_samples
    assert sizes.min() >= least and made.clients == asked.clients
    assert (made.seen, made.new) == (asked.seen_clients, asked.held_out)
    assert make_partition(asked, labels, 20, classes).fingerprint == made.fingerprint
    folder: Path = tmp_path_factory.getbasetemp() / "partition"
    save_partition(made, asked, labels, [str(c) for c in range(classes)], folder)
    again: Partition = load_partition(folder)
    assert again.fingerprint == made.fingerprint and again.names == made.names
    np.testing.assert_array_equal(again.client, made.client)
    np.testing.assert_array_equal(again.split, made.split)
