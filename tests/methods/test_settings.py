import pytest

from fedcoe.methods.base import Method
from fedcoe.methods.settings import MethodSettings, method_class, method_names, settings_for


def test_a_method_is_named_like_its_file():
    assert {"fedavg", "fedcoe"} <= set(method_names())
    assert not {"base", "settings"} & set(method_names())


@pytest.mark.parametrize("name", method_names())
def test_every_file_defines_one_method_with_settings_of_that_name(name):
    found = method_class(name)
    assert issubclass(found, Method)
    assert issubclass(found.Settings, MethodSettings)
    assert settings_for({"name": name}) == found.Settings()


@pytest.mark.parametrize("name", method_names())
def test_every_setting_has_a_description_or_a_short_list_of_choices(name):
    for key, field in method_class(name).Settings.model_fields.items():
        assert field.annotation is not None, key
        assert not field.is_required(), key


def test_keys_that_another_method_has_are_left_out_but_others_are_errors():
    assert settings_for({"name": "fedavg", "experts": 3, "gate": "nonsense"}).name == "fedavg"
    with pytest.raises(ValueError, match="expertz"):
        settings_for({"name": "fedavg", "expertz": 3})


def test_fedcoe_is_the_default():
    assert settings_for({}).name == "fedcoe"
