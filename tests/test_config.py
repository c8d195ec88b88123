from pathlib import Path

import pytest
from pydantic import ValidationError

from fedcoe.config import Settings, load_profile, load_settings, validate_settings
from fedcoe.errors import FedCoEError
from fedcoe.methods.settings import method_class, method_names, settings_for
from fedcoe.models import EXPERTS

PARAMS = Path(__file__).parent.parent / "params.yaml"


@pytest.fixture
def params(tmp_path):
    """Write params.yaml and return its path."""

    def write(text=""):
        path = tmp_path / "params.yaml"
        path.write_text(text)
        return path

    return write


def refused(path, *overrides):
    with pytest.raises(FedCoEError) as caught:
        load_settings(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_committed_params_are_valid_and_an_empty_file_means_the_defaults(params):
    assert load_settings(PARAMS).method.name == "fedcoe"
    assert load_settings(params("")) == Settings()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train: {lr: 0}", "train.lr", "0"),
        ("train: {lr: .nan}", "train.lr", "nan"),
        ("train: {momentum: 1.0}", "train.momentum", "1.0"),
        ("train: {cohort: 0}", "train.cohort", "0"),
        ("train: {rounds: 2.5}", "train.rounds", "2.5"),
        ("train: {augment: rotate}", "train.augment", "'rotate'"),
        ("train: {quorum: 1.5}", "train.quorum", "1.5"),
        ("train: {seed: -1}", "train.seed", "-1"),
        ("train: {seed: 4294967296}", "train.seed", "4294967296"),
        ("evaluate: {every: 0}", "evaluate.every", "0"),
        ("partition: {alpha: -0.1}", "partition.alpha", "-0.1"),
        ("partition: {scheme: random}", "partition.scheme", "'random'"),
        ("method: {experts: 0}", "method.experts", "0"),
        ("method: {ridge: .inf}", "method.ridge", "inf"),
        ("method: {correlation_floor: 0.0}", "method.correlation_floor", "0.0"),
        ("model: {name: cnn5}", "model.name", "'cnn5'"),
        ("runtime: {workers: many}", "runtime.workers", "'many'"),
    ],
)
def test_a_wrong_value_is_named_with_file_key_value_and_what_is_allowed(params, text, key, value):
    path = params(text)
    message = refused(path)
    assert message.startswith(f"{path}: {key} = {value}: ")
    assert len(message) > len(f"{path}: {key} = {value}: ")


@pytest.mark.parametrize("name", EXPERTS)
def test_every_model_there_is_may_be_chosen(params, name):
    assert load_settings(params(f"model: {{name: {name}}}")).model.name == name


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("train: {learning_rate: 0.1}", "train.learning_rate = 0.1"),
        ("trian: {lr: 0.1}", "trian"),
        ("method: {expert: 4}", "method.expert = 4"),
        ("method: {name: fedavg, expert: 4}", "method.expert = 4"),
        ("runtime: {threads: 2}", "runtime.threads = 2"),
    ],
)
def test_an_unknown_key_is_an_error(params, text, key):
    path = params(text)
    message = refused(path)
    assert message.startswith(f"{path}: {key}")
    assert "unknown key" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: {experts: 2, experts_per_client: 3}", ["experts_per_client = 3", "experts = 2"]),
        ("method: {gate: neural}", ["coordination_head", "gate: analytic"]),
        ("partition: {validation: 0.5, test: 0.5}", ["validation + test"]),
        ("partition: {new_clients_by: feature_group}", ["feature_skew"]),
        ("partition: {feature_skew: inversion}", ["feature_groups: 2"]),
        ("partition: {clients: 2, new_clients: 0.9}", ["no seen client"]),
    ],
)
def test_impossible_combinations_say_what_does_not_fit(params, text, words):
    path = params(text)
    message = refused(path)
    assert message.startswith(f"{path}: {text.partition(':')[0]}")
    assert all(word in message for word in words)


def test_every_mistake_is_told_at_once(params):
    message = refused(params("train: {lr: 0, cohort: 2}\nevaluate: {every: 0}"))
    assert all(key in message for key in ("train.lr", "train.cohort", "evaluate.every"))


def test_a_duplicate_key_is_refused(params):
    path = params("train:\n  lr: 0.1\n  lr: 0.2\n")
    message = refused(path)
    assert message.startswith(f"{path}: not readable as YAML")
    assert "lr" in message


@pytest.mark.parametrize("text", ["- a\n- b", "just words", "train: [", "a: b: c", "{\x00}"])
def test_what_is_no_mapping_of_sections_is_refused_in_one_line(params, text):
    path = params(text)
    assert refused(path).startswith(f"{path}: ")


def test_a_section_that_is_a_number_is_refused(params):
    path = params("train: 3")
    assert refused(path).startswith(f"{path}: train = 3: ")


def test_a_missing_or_binary_file_is_named(tmp_path):
    assert refused(tmp_path / "none.yaml").startswith(f"{tmp_path / 'none.yaml'}: no such file")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert refused(tmp_path / "b.yaml").startswith(f"{tmp_path / 'b.yaml'}: not readable")


def test_overrides_win_over_the_file_and_the_last_over_the_first(params):
    path = params("train: {lr: 0.1, rounds: 7}")
    found = load_settings(
        path, ["train.lr=1e-3", "train.lr=2e-3", "method.coordination_head=false", "data.name=x y"]
    )
    assert (found.train.lr, found.train.rounds) == (0.002, 7)
    assert found.method.coordination_head is False
    assert found.data.name == "x y"


@pytest.mark.parametrize("override", ["train.lr", "train=5", "lr=5", ".lr=5", "train.=5", ""])
def test_a_malformed_override_is_quoted_with_the_right_form(params, override):
    message = refused(params(), override)
    assert repr(override) in message
    assert "section.key=value" in message


def test_an_override_is_checked_like_the_file(params):
    assert "train.lr = 11" in refused(params(), "train.lr=11")
    assert "train.lrr = 1" in refused(params(), "train.lrr=1")
    assert "train.lr" in refused(params("train: 3"), "train.lr=1").replace("=", ".lr=")


def test_the_override_reader_does_not_run_yaml_tags(params):
    refused(params(), "data.name=!!python/object/apply:os.getcwd []")


def test_switching_the_method_leaves_other_methods_keys_out(params):
    path = params("method: {name: fedcoe, experts: 8, server_momentum: 0.3}")
    found = load_settings(path, ["method.name=fedavg"]).method
    assert type(found) is method_class("fedavg").Settings
    assert not hasattr(found, "experts")
    assert found.server_momentum == 0.3


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_defaults_and_takes_the_committed_params(name):
    assert settings_for({"name": name}).name == name
    found = load_settings(PARAMS, [f"method.name={name}"])
    assert type(found.method) is method_class(name).Settings


def test_an_unknown_method_is_answered_with_those_there_are(params):
    message = refused(params("method: {name: fedsgd}"))
    assert "'fedsgd'" in message
    assert all(name in message for name in method_names())


def test_settings_survive_their_own_json(params):
    found = load_settings(PARAMS, ["method.experts=3", "method.gate_every=2"])
    again = validate_settings(found.model_dump(mode="json"), "copy")
    assert again == found.model_copy(update={"tune": Settings().tune})
    assert again.method.gate_every == 2


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValidationError):
        Settings().train.lr = 1.0


def test_the_fingerprint_names_the_values_of_the_sections_asked_for(params):
    path = params()
    one, two = load_settings(path), load_settings(path, ["train.lr=0.5"])
    assert one.fingerprint() == load_settings(path).fingerprint()
    assert one.fingerprint() != two.fingerprint()
    assert one.fingerprint("partition", "data") == two.fingerprint("partition", "data")
    assert one.fingerprint("train") != two.fingerprint("train")
    deep = load_settings(path, ["method.gate_temperature=0.4"])
    assert one.fingerprint() != deep.fingerprint()
    assert len(one.fingerprint()) == 16


@pytest.mark.parametrize(
    ("searched", "said"),
    [
        ("{low: 1}", "give {low: ..., high: ...} or {choices: [...]}"),
        ("{choices: []}", "give {low: ..., high: ...} or {choices: [...]}"),
        ("{low: 2, high: 1}", "low = 2 must be less than high = 1"),
        ("{low: 0, high: 1, log: true}", "log needs low > 0"),
        ("{low: 1, high: 2, log: true, step: 1}", "no step"),
        ("{choices: [1], low: 0}", "not both"),
        ("{lo: 1, high: 2}", "unknown key"),
        ("{low: .inf, high: 2}", "finite"),
        ("0.1", "keys and values"),
    ],
)
def test_a_search_that_means_nothing_is_refused_with_the_key_it_is_for(params, searched, said):
    path = params(f"tune: {{space: {{train.lr: {searched}}}}}")
    message = refused(path)
    assert message.startswith(f"{path}: tune.space.train.lr")
    assert said in message


def test_what_is_trained_is_named_without_the_search(params):
    path = params()
    one, two = load_settings(path), load_settings(path, ["tune.trials=3", "tune.seed=5"])
    assert two.tune.trials == 3
    assert one.fingerprint() == two.fingerprint()
    assert one.model_dump() == two.model_dump()


def test_of_many_mistakes_the_first_are_named_and_the_rest_counted() -> None:
    with pytest.raises(FedCoEError) as refused:
        validate_settings({f"section{i}": 1 for i in range(9)}, "params.yaml")
    said = str(refused.value)
    assert said.count("unknown key") == 4 and said.endswith("; and 5 more")


REPOSITORY = Path(__file__).parents[1]


def test_a_profile_s_settings_win_over_the_file_and_those_of_the_command_over_both(tmp_path):
    (tmp_path / "profiles.yaml").write_text("long:\n  train.rounds: 90\n  train.augment: crop\n")
    profile = load_profile(tmp_path / "profiles.yaml", "long")
    settings = load_settings(REPOSITORY / "params.yaml", [*profile, "train.augment=none"])
    assert (settings.train.rounds, settings.train.augment) == (90, "none")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("other: {train.lr: 1}", "no profile 'long'; there are: other"),
        ("long: [1]", "must map profile names"),
        ("- long", "must map profile names"),
        ("", "must map profile names"),
        ("long: {", "not readable as YAML"),
        (None, "no such file"),
    ],
)
def test_a_profile_that_is_missing_or_malformed_is_named(tmp_path, text, words):
    path = tmp_path / "profiles.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FedCoEError, match=r"profiles\.yaml") as error:
        load_profile(path, "long")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "name", ["cifar10-dir01", "cifar10-dir05", "cifar10-rot4", "fashion-dir01"]
)
def test_the_repository_s_profiles_are_possible_and_have_20_clients_and_5_new_ones(name):
    profile = load_profile(REPOSITORY / "profiles.yaml", name)
    partition = load_settings(REPOSITORY / "params.yaml", profile).partition
    assert (partition.seen_clients, partition.held_out) == (20, 5)
