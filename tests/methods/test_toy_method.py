"""A method is one new file: nothing else is edited to train, evaluate and serve it."""

import sys

import pytest

import fedcoe.methods
from fedcoe.errors import FedCoEError
from fedcoe.methods.settings import method_class, method_names, settings_for

TOY = '''
"""Half steps: FedAvg that goes half the way."""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from fedcoe.methods.base import Method
from fedcoe.methods.settings import MethodSettings


class HalfwaySettings(MethodSettings):
    name: Literal["halfway"] = "halfway"
    stride: float = Field(0.5, gt=0.0, le=1.0, description="Part of the way")


class Halfway(Method):
    Settings = HalfwaySettings

    def server_step(self, state, update):
        return super().server_step(state, self.settings.stride * update)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that the package also looks into."""
    folder = tmp_path / "more_methods"
    folder.mkdir()
    monkeypatch.setattr(fedcoe.methods, "__path__", [*fedcoe.methods.__path__, str(folder)])
    yield folder
    sys.modules.pop("fedcoe.methods.halfway", None)
    if hasattr(fedcoe.methods, "halfway"):
        del fedcoe.methods.halfway
    method_class.cache_clear()


@pytest.fixture
def toy(folder):
    (folder / "halfway.py").write_text(TOY)


def test_a_toy_method_takes_one_new_file_and_no_other_edit(
    toy, make_method, make_engine, train, runs_on_both_engines
):
    assert "halfway" in method_names()
    assert settings_for({"name": "halfway", "experts": 3, "stride": 0.25}).stride == 0.25
    # Its keys in params.yaml do not disturb other methods.
    assert settings_for({"name": "fedavg", "stride": 0.25}).name == "fedavg"
    method = make_method(name="halfway")
    slower = train(make_engine(), make_method(name="fedavg", server_lr=0.5), 2)
    found = runs_on_both_engines(method)
    assert found.state.experts.tobytes() == slower.experts.tobytes()


def test_without_its_file_there_is_no_such_method():
    assert "halfway" not in method_names()
    with pytest.raises(ValueError, match="no method 'halfway'"):
        settings_for({"name": "halfway"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def shared(): ...\n", r"halfway.py: must define one subclass of Method, found none"),
        (TOY + TOY.replace("Halfway(", "Twice("), r"found Halfway, Twice; what methods share goes"),
        ("def broken(:\n", r"halfway\.py, line 1: invalid syntax"),
    ],
    ids=["none", "two", "syntax"],
)
def test_a_file_that_is_no_method_is_named(folder, text, said):
    (folder / "halfway.py").write_text(text)
    with pytest.raises(FedCoEError, match=said):
        settings_for({"name": "fedavg"})


def test_a_file_whose_name_begins_with_an_underscore_is_no_method(folder):
    (folder / "_shared.py").write_text("def shared(): ...\n")
    assert "_shared" not in method_names()
    assert settings_for({"name": "fedavg"}).name == "fedavg"
