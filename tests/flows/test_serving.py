"""The registered mixture behind `mlflow models serve`: right answers, and plain refusals."""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

Ask = Callable[..., tuple[int, str]]


@pytest.fixture
def strictly() -> Ask:
    """`strictly(body)`: status and text of the checks alone, before MLflow parses anything."""
    from mlflow.exceptions import MlflowException

    from tasks.served_model import strict

    metadata = SimpleNamespace(get_params_schema=lambda: [SimpleNamespace(name="mode")])

    def served(data: Any, content_type: str, model: Any, schema: Any) -> Any:
        if np.array_equal(data["inputs"], [13]):
            raise MlflowException(
                "Failed to predict data '[13]'. \nError: it is 13", stack_trace="x"
            )
        assert all(image.dtype == np.uint8 for image in data["inputs"])
        images = [image.tolist() for image in data["inputs"]]
        return SimpleNamespace(status=200, response=json.dumps(data | {"inputs": images}))

    def ask(body: Any, content_type: str | None = "application/json") -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            found = strict(served)(data, content_type, SimpleNamespace(metadata=metadata), None)
        except MlflowException as error:
            return error.get_http_status_code(), error.serialize_as_json()
        return found.status, found.response

    return ask


REFUSED: dict[str, tuple[Any, str]] = {
    "fractions": ({"inputs": [[0.5, 1]]}, "0.5"),
    "not a number": ({"inputs": [float("nan")]}, "NaN"),
    "no JSON": (b"{nope", "no JSON"),
    "no text": (b"\xff\xfe", "no JSON"),
    "deep": (b"[" * 100_000, "no JSON"),
    "a list": ([1], "must be"),
    "no images": ({"inputs": []}, "at least one"),
    "too bright": ({"inputs": [[1, 256]]}, "inputs hold 256"),
    "too dark": ({"inputs": [[-1, 300]]}, "inputs hold -1"),
    "too large": ({"inputs": [[2**70]]}, "pixels are 0 to 255"),
    "digits in words": ({"inputs": [["1", "2"]]}, "integers"),
    "truth": ({"inputs": [[True, False]]}, "integers"),
    "nothing": ({"inputs": [[None]]}, "integers"),
    "objects": ({"inputs": [{"a": 1}]}, "integers"),
    "rows of two lengths": ({"inputs": [[1, 2], [3]]}, "differ in length"),
    "a word": ({"inputs": "hello"}, "list of images"),
    "both names": ({"inputs": [1], "instances": [1]}, "must be"),
    "a table": ({"dataframe_split": {}}, "must be"),
    "another key": ({"inputs": [1], "mode": "none"}, "mode is unknown"),
    "unknown params": ({"inputs": [1], "params": {"modus": "none"}}, "params.modus is unknown"),
    "params as a list": ({"inputs": [1], "params": [1]}, "params must be an object"),
    "nested params": ({"inputs": [1], "params": {"mode": [[1]]}}, "list of integers"),
}


@pytest.mark.parametrize("body", REFUSED)
def test_requests_are_refused_before_numbers_are_cast(strictly: Ask, body: str) -> None:
    status, text = strictly(REFUSED[body][0])
    assert status == 400 and REFUSED[body][1] in text


def test_other_content_is_refused_and_right_requests_pass_unchanged(strictly: Ask) -> None:
    for content in ("text/csv", "application/vnd.apache.parquet", None):
        assert strictly({"inputs": [1]}, content) == (415, "send application/json")
    body = {"inputs": [[1, 2]], "params": {"mode": "none"}}
    for sent in (body, {"instances": [[1, 2]], "params": {"mode": "none"}}):
        status, text = strictly(sent, "application/json; charset=utf-8")
        assert (status, json.loads(text)) == (200, body)


def test_what_mlflow_refuses_is_said_without_the_request_and_a_stack_trace(strictly: Ask) -> None:
    _, text = strictly({"inputs": [13]})
    assert json.loads(text)["message"] == "it is 13"
    assert "stack_trace" not in json.loads(text)


def test_a_request_that_is_too_long_is_not_parsed(
    strictly: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.served_model.MAX_BYTES", 10)
    assert strictly(b"x" * 11)[0] == 413


@pytest.fixture
def loaded(stores: Any) -> Any:
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model("models:/fedcoe@candidate")


def test_the_signature_declares_images_probabilities_and_params(loaded: Any) -> None:
    signature = loaded.metadata.signature.to_dict()
    [images], [p] = json.loads(signature["inputs"]), json.loads(signature["outputs"])
    assert images["tensor-spec"] == {"dtype": "uint8", "shape": [-1, 8, 8, 1]}
    assert p["tensor-spec"] == {"dtype": "float64", "shape": [-1, 10]}
    params = {p["name"]: (p["type"], p["default"]) for p in json.loads(signature["params"])}
    assert params == {
        "mode": ("string", "none"),
        "inputs": ("string", ""),
        "labels": ("long", []),
        "label_counts": ("long", []),
    }


def test_params_reach_the_cold_start_modes(loaded: Any, project: Path) -> None:
    from fedcoe.bundle import load_bundle

    bundle = load_bundle(project / "models")
    x, y = (np.load(project / f"data/{name}_test.npy")[:40] for name in "xy")
    read = base64.b64encode(x[:20].tobytes()).decode()
    counts = np.bincount(y[:20], minlength=10)
    for params, expected in (
        ({"mode": "unlabelled", "inputs": read}, bundle.predict(x, "unlabelled", inputs=x[:20])),
        (
            {"mode": "labels", "inputs": read, "labels": y[:20].tolist()},
            bundle.predict(x, "labels", inputs=x[:20], labels=y[:20]),
        ),
        (
            {"mode": "labels", "label_counts": counts.tolist()},
            bundle.predict(x, "labels", label_counts=counts),
        ),
    ):
        np.testing.assert_allclose(loaded.predict(x, params=params), np.exp(expected), atol=1e-12)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"mode": "magic"}, "none, unlabelled, labels"),
        ({"mode": "labels"}, "label_counts: 10 numbers"),
        ({"mode": "labels", "label_counts": [1, 2]}, "10 numbers"),
        ({"mode": "labels", "label_counts": [-1] + [2] * 9}, "10 numbers"),
        ({"mode": "labels", "label_counts": [2**70] * 10}, "too large"),
        ({"mode": "labels", "labels": [1]}, "not 2 integers"),
        ({"mode": "labels", "labels": [1, 10]}, "0 to 9"),
        ({"mode": "none", "labels": [1, 2]}, "labels are for mode labels"),
        ({"mode": "unlabelled", "label_counts": [1] * 10}, "label_counts are for mode labels"),
        ({"mode": "none", "inputs": "A" * 86 + "=="}, "inputs are for mode unlabelled and labels"),
        ({"mode": "unlabelled", "inputs": "AAAA"}, "3 bytes, not a multiple of 64"),
        ({"mode": "unlabelled", "inputs": "no base64!"}, "base64 of uint8 bytes .i, 8, 8, 1."),
        ({"mode": 3}, "string"),
    ],
)
def test_params_that_do_not_fit_are_the_callers_mistake(
    loaded: Any, params: dict[str, Any], said: str
) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=said) as caught:
        loaded.predict(np.zeros((2, 8, 8, 1), np.uint8), params=params)
    assert caught.value.get_http_status_code() == 400


def test_too_many_images_are_refused(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served = loaded.unwrap_python_model()
    monkeypatch.setitem(type(served).predict.__globals__, "MAX_IMAGES", 2)
    loaded.predict(np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(Exception, match="3 images in one request; at most 2"):
        loaded.predict(np.zeros((3, 8, 8, 1), np.uint8))


@pytest.fixture(scope="module")
def server(project: Path, model_server: Callable[..., Any]) -> Iterator[str]:
    store = f"sqlite:///{project}/.fedcoe/mlflow.db"
    with model_server(store, "candidate", project.parent / "serve.log") as address:
        yield address


def post(address: str, body: Any, content: str = "application/json") -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/invocations", data, {"Content-Type": content})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_a_real_server_answers_a_new_client_and_refuses_nonsense(
    server: str, project: Path
) -> None:
    from fedcoe.bundle import load_bundle

    images = np.load(project / "data/x_test.npy")[:30]
    read = base64.b64encode(images.tobytes()).decode()
    for params, mode in ((None, "none"), ({"mode": "unlabelled", "inputs": read}, "unlabelled")):
        body = {"inputs": images.tolist()} | ({"params": params} if params else {})
        status, text = post(server, body)
        expected = np.exp(load_bundle(project / "models").predict(images, mode))
        assert status == 200
        np.testing.assert_allclose(json.loads(text)["predictions"], expected, atol=1e-9)

    x = images.tolist()
    bad: list[tuple[Any, int, str]] = [
        ({"inputs": (images / 16.0).tolist()}, 400, "integers"),
        ({"inputs": (images + np.int64(300)).tolist()}, 400, "pixels are 0 to 255"),
        ({"inputs": (-1 - images.astype(int)).tolist()}, 400, "pixels are 0 to 255"),
        ({"inputs": images[:, :5].tolist()}, 400, "expected shape (-1, 8, 8, 1)"),
        ({"inputs": [[[1, 2], [3]]]}, 400, "differ in length"),
        ({"inputs": x, "params": {"mode": "magic"}}, 400, "none, unlabelled, labels"),
        ({"inputs": x, "params": {"mode": "labels", "label_counts": [1]}}, 400, "10 numbers"),
        ({"inputs": x, "params": {"mode": 3}}, 400, "mode"),
        ({"inputs": x, "params": {"mode": "unlabelled", "inputs": "AAAA"}}, 400, "multiple of 64"),
        (b"{nope", 400, "no JSON"),
    ]
    for body, expected_status, said in bad:
        status, text = post(server, body)
        assert (status, said in text) == (expected_status, True), text
        assert "Traceback" not in text and "stack_trace" not in text
        assert len(text) < 700, text
    assert post(server, b"a,b\n1,2", "text/csv") == (415, "send application/json")
    assert post(server, {"inputs": x})[0] == 200
