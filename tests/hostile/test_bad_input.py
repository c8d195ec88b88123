"""What a mistake in a file or a request gets: one line that names it, and nothing is changed.

One row of the table in docs/reliability.md a case; the case's name stands there.
"""

import base64
import hashlib
import json
import os
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image
from safetensors.numpy import load_file, save_file

from fedcoe.bundle import load_bundle
from fedcoe.config import PartitionSettings, load_settings
from fedcoe.data.dataset import load_dataset
from fedcoe.data.fetch import fetch
from fedcoe.data.partition import Partition, load_partition, save_partition
from fedcoe.data.sources.client import read_client
from fedcoe.data.sources.images import read_images
from fedcoe.engine.clients import ClientData
from fedcoe.errors import FedCoEError
from fedcoe.join import join

ROOT = Path(__file__).parents[2]
SHAPE, CLASSES = (8, 8, 1), ("a", "b", "c", "d")
PIXELS = np.zeros((2, 8, 8, 1), np.uint8)


class Case(NamedTuple):
    damage: Callable[[Path], object]
    call: Callable[[Path], object]
    said: tuple[str, ...]


def snapshot(folder: Path) -> dict[str, str]:
    """Every entry below a folder and what is in it."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else f"mode {path.lstat().st_mode:o}"
        )
        for path in folder.rglob("*")
    }


# What is called


def settings(site: Path) -> object:
    return load_settings(site / "params.yaml")


def override(text: str) -> Callable[[Path], object]:
    return lambda site: load_settings(site / "params.yaml", [text])


def dataset(site: Path) -> object:
    return load_dataset(site / "data")


def own_images(site: Path) -> object:
    return fetch(from_path=site / "photos", target=site / "data", download_dir=site / "downloads")


def own_arrays(site: Path) -> object:
    return fetch(from_path=site / "own.npz", target=site / "data", download_dir=site / "downloads")


def client(site: Path) -> object:
    return read_client(site / "client.npz", SHAPE, CLASSES)


def predict(name: str) -> Callable[[Path], object]:
    return lambda site: read_images(site / name, SHAPE)


def partition(site: Path) -> object:
    return ClientData(load_dataset(site / "data"), load_partition(site / "partitions"))


def models(site: Path) -> object:
    return load_bundle(site / "models")


def served(params: dict[str, Any], images: Any = PIXELS) -> Callable[[Path], object]:
    """The model behind HTTP, asked as MLflow asks it."""

    def call(site: Path) -> object:
        from tasks.served_model import Predictor

        predictor = Predictor()
        predictor.config, predictor.bundle = {"part": "mixture"}, load_bundle(site / "models")
        return predictor.predict(None, images, params)

    return call


def request(body: Any) -> Callable[[Path], object]:
    """The checks before MLflow parses a request."""

    def call(site: Path) -> object:
        from tasks.served_model import strict

        metadata = SimpleNamespace(get_params_schema=lambda: [SimpleNamespace(name="mode")])
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        model = SimpleNamespace(metadata=metadata)
        return strict(lambda *_: pytest.fail("served"))(data, "application/json", model, None)

    return call


def joined(**changes: Any) -> Callable[[Path], object]:
    arguments = {"images": np.zeros((2, 8, 8, 1), np.uint8)} | changes
    return lambda site: join(load_bundle(site / "models"), **arguments)


# What is damaged


def nothing(site: Path) -> None:
    pass


def write(name: str, content: bytes | str) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda site: (site / name).write_bytes(data)


def params(text: str) -> Callable[[Path], object]:
    return write("params.yaml", text)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file; its hash, if it has one, is left out as older versions did."""

    def damage(site: Path) -> None:
        values = json.loads((site / name).read_text())
        values.pop("hash" if name.startswith("models") else "", None)
        (site / name).write_text(json.dumps(values | changes))

    return damage


def arrays(name: str, **changes: Any) -> Callable[[Path], None]:
    def damage(site: Path) -> None:
        with np.load(site / name) as file:
            values = dict(file)
        np.savez(site / name, **(values | changes))

    return damage


def npy(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda site: np.save(site / name, change(np.load(site / name)))


def claim(name: str, shape: str) -> Callable[[Path], None]:
    """A header that claims another shape, at the same length."""

    def damage(site: Path) -> None:
        content = (site / name).read_bytes()
        old = re.search(rb"'shape': \([^)]*\), }\s*", content[:128])
        assert old
        new = f"'shape': {shape}, }}".encode().ljust(len(old.group()) - 1) + b"\n"
        (site / name).write_bytes(content.replace(old.group(), new))

    return damage


def pipe(name: str) -> Callable[[Path], None]:
    def damage(site: Path) -> None:
        (site / name).unlink()
        os.mkfifo(site / name)

    return damage


def folder_there(name: str) -> Callable[[Path], None]:
    def damage(site: Path) -> None:
        (site / name).unlink()
        (site / name).mkdir()

    return damage


def picture(name: str, array: Any) -> Callable[[Path], None]:
    def damage(site: Path) -> None:
        (site / name).parent.mkdir(exist_ok=True)
        Image.fromarray(array).save(site / name)

    return damage


def remade(**changes: Any) -> Callable[[Path], None]:
    """A partition with other parts and the fingerprint of these: somebody's, not an accident."""

    def damage(site: Path) -> None:
        old = load_partition(site / "partitions")
        parts = {n: getattr(old, n) for n in ("client", "split", "group", "test_group")}
        values = parts | {n: getattr(old, n) for n in ("seen", "new", "skew", "names")}
        for name, change in changes.items():
            values[name] = change(values[name])
        made = Partition(**values)
        labels = np.zeros(len(made.client), np.int64)
        save_partition(made, PartitionSettings(), labels, CLASSES, site / "partitions")

    return damage


def last(value: int) -> Callable[[Any], Any]:
    return lambda array: np.append(array[:-1], np.asarray(value, array.dtype))


def weights(name: str, key: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change an array of a model; without the hash, as files of older versions are."""

    def damage(site: Path) -> None:
        values = load_file(site / "models" / name)
        first = key or next(iter(values))
        save_file(values | {first: change(values[first])}, site / "models" / name)

    return damage


def hole(array: Any) -> Any:
    array = array.copy()
    array.flat[0] = np.nan
    return array


def drop(name: str) -> Callable[[Path], None]:
    return lambda site: (site / name).unlink()


def lzma_arrays(site: Path) -> None:
    with np.load(site / "own.npz") as file:
        values = dict(file)
    with zipfile.ZipFile(site / "own.npz", "w", zipfile.ZIP_LZMA) as archive:
        for name, array in values.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, array)


def twice(site: Path) -> None:
    with zipfile.ZipFile(site / "own.npz", "a") as archive:
        content = archive.read("x_test.npy")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x_test.npy", content)


def link_out(site: Path) -> None:
    (site / "photos/cat/9.png").symlink_to(site / "client.npz")


def linked_split(site: Path) -> None:
    (site / "photos").rename(site / "elsewhere")
    (site / "photos/test/cat").mkdir(parents=True)
    (site / "photos/train").symlink_to(site / "elsewhere")


EXPERT, GATE, STATE = "experts/expert-0.safetensors", "gate.safetensors", "models/state.json"
DEEP = '{"a":' * 5000
BOMB = "a: &a [x, x]\n" + "".join(
    f"{k}: &{k} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, k in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE = "a: &a {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [*a{i - 1 or ''}, *a{i - 1 or ''}]}}\n" for i in range(1, 40)
)

CASES = {
    # params.yaml
    "params: tabs instead of spaces": Case(
        params("train:\n\tlr: 0.1\n"), settings, ("params.yaml", "\\t", "line 2")
    ),
    "params: written as UTF-16": Case(
        write("params.yaml", "train: {}".encode("utf-16")), settings, ("params.yaml", "utf-8")
    ),
    "params: an umlaut in Latin-1": Case(
        write("params.yaml", b"data: {name: M\xfcnchen}"), settings, ("params.yaml", "utf-8")
    ),
    "params: aliases that stand for a billion values": Case(
        params(BOMB), settings, ("params.yaml", "aliases")
    ),
    "params: merged aliases that double each line": Case(
        params(MERGE), settings, ("params.yaml", "aliases")
    ),
    "params: nested five thousand deep": Case(
        params("[" * 5000), settings, ("params.yaml", "nested too deeply")
    ),
    "params: longer than anybody writes": Case(
        params("# " + "x" * 100_000), settings, ("params.yaml", "100000 characters")
    ),
    "params: a date that does not exist": Case(
        params("data: {name: 2024-13-45}"), settings, ("params.yaml", "month")
    ),
    "params: a number of five thousand digits": Case(
        params(f"train: {{rounds: {'9' * 5000}}}"), settings, ("params.yaml", "digits")
    ),
    "params: a tag that asks for code": Case(
        params("train: !!python/object/apply:os.system [ls]"), settings, ("params.yaml", "tag")
    ),
    "params: a section that is a list": Case(
        params("train: [1]"), settings, ("params.yaml: train = [1]", "section of keys and values")
    ),
    "params: a section left empty": Case(
        params("train:\n"), settings, ("params.yaml: train = None", "section of keys and values")
    ),
    "params: a number in words": Case(
        params("train: {lr: fast}"), settings, ("params.yaml: train.lr = 'fast'", "number")
    ),
    "params: a list in the place of a number": Case(
        params("train: {rounds: [1, 2]}"), settings, ("train.rounds = [1, 2]", "integer")
    ),
    "params: infinitely many rounds": Case(
        params("train: {rounds: .inf}"), settings, ("train.rounds = inf",)
    ),
    "params: more rounds than the limit": Case(
        params("train: {rounds: 1000000000}"), settings, ("train.rounds = 1000000000", "100000")
    ),
    "params: a key that is a number": Case(params("1: {lr: 2}"), settings, ("params.yaml: 1",)),
    "params: a list at the top": Case(params("[]"), settings, ("must be a mapping", "list")),
    "params: a folder of that name": Case(
        folder_there("params.yaml"), settings, ("params.yaml", "directory")
    ),
    "params: an override with half a list": Case(
        nothing, override("train.lr=["), ("override 'train.lr=['",)
    ),
    # data/
    "data: a header that claims 10**12 images": Case(
        claim("data/x_train.npy", "(1000000000000, 8, 8, 1)"),
        dataset,
        ("x_train.npy", "claims 64000000000000 bytes", "fedcoe fetch"),
    ),
    "data: labels as fractions": Case(
        npy("data/y_train.npy", lambda y: y + 0.5), dataset, ("y_train.npy", "float64", "int64")
    ),
    "data: a label below zero": Case(
        npy("data/y_test.npy", last(-1)), dataset, ("y_test.npy", "outside 0..3")
    ),
    "data: pixels as floats": Case(
        npy("data/x_test.npy", lambda x: x / 255), dataset, ("x_test.npy", "float64", "uint8")
    ),
    "data: a mean that is NaN": Case(
        edit("data/dataset.json", mean=[float("nan")]),
        dataset,
        ("dataset.json", "mean.0", "finite"),
    ),
    "data: one class alone": Case(
        edit("data/dataset.json", classes=["a"]), dataset, ("dataset.json", "classes")
    ),
    "data: a deviation of zero": Case(
        edit("data/dataset.json", std=[0.0]), dataset, ("dataset.json", "std.0", "greater than 0")
    ),
    "data: a description nested five thousand deep": Case(
        write("data/dataset.json", DEEP), dataset, ("dataset.json", "recursion")
    ),
    "data: a folder in the place of an array": Case(
        folder_there("data/x_train.npy"), dataset, ("x_train.npy", "fedcoe fetch")
    ),
    "data: a pipe in the place of an array": Case(
        pipe("data/y_train.npy"), dataset, ("y_train.npy", "is not a file")
    ),
    "data: an array of a record type": Case(
        npy("data/y_train.npy", lambda y: y.astype([("a", "<i8")])),
        dataset,
        ("y_train.npy", "no plain .npy header"),
    ),
    # own images
    "own images: one class alone": Case(
        lambda site: (site / "photos/dog").rename(site / "dog"), own_images, ("two classes",)
    ),
    "own images: an empty file": Case(
        write("photos/cat/0.png", b""), own_images, ("photos/cat/0.png", "it is none of PNG")
    ),
    "own images: text that is called .png": Case(
        write("photos/cat/0.png", "hello"), own_images, ("photos/cat/0.png", "not readable")
    ),
    "own images: sixteen bits a pixel": Case(
        picture("photos/cat/0.png", np.zeros((8, 8), np.uint16)),
        own_images,
        ("photos/cat/0.png", "convert it to 8 bits"),
    ),
    "own images: half a file": Case(
        lambda site: os.truncate(site / "photos/cat/0.png", 80),
        own_images,
        ("photos/cat/0.png", "not readable"),
    ),
    "own images: a class with a line break in its name": Case(
        picture("photos/ca\nt/0.png", PIXELS[0, ..., 0]), own_images, ("'ca\\nt'", "rename it")
    ),
    "own images: a class of spaces": Case(
        lambda site: (site / "photos/dog").rename(site / "photos/ "),
        own_images,
        ("class name ' '",),
    ),
    "own images: a link to a file outside": Case(
        link_out, own_images, ("9.png", "link that leaves the folder")
    ),
    "own images: train/ is a link": Case(
        linked_split, own_images, ("photos/train", "is a link", "put the folder itself there")
    ),
    "own images: an image in the folder of the classes": Case(
        picture("photos/0.png", PIXELS[0, ..., 0]), own_images, ("mixes layouts",)
    ),
    # own arrays
    "own arrays: packed by LZMA": Case(lzma_arrays, own_arrays, ("own.npz", "deflate")),
    "own arrays: one array twice": Case(twice, own_arrays, ("own.npz", "same name")),
    "own arrays: one class alone": Case(
        arrays("own.npz", y_train=np.zeros(48, int), y_test=np.zeros(48, int)),
        own_arrays,
        ("two classes",),
    ),
    "own arrays: a class with a line break in its name": Case(
        arrays("own.npz", classes=np.array(["a", "b\nc", "d", "e"])),
        own_arrays,
        ("'b\\nc'", "no printable text"),
    ),
    "own arrays: complex pixels": Case(
        arrays("own.npz", x_test=np.zeros((48, 8, 8, 1), complex)), own_arrays, ("complex128",)
    ),
    "own arrays: client ids of another length": Case(
        arrays("own.npz", client_train=np.arange(3)), own_arrays, ("client_train", "48 integers")
    ),
    "own arrays: a test label that training lacks": Case(
        arrays("own.npz", y_test=np.full(48, 7)), own_arrays, ("y_test", "0", "7")
    ),
    "own arrays: cut short": Case(
        lambda site: os.truncate(site / "own.npz", 900), own_arrays, ("own.npz", "zip")
    ),
    # a client to join or predict for
    "client: a label below zero": Case(
        arrays("client.npz", y=np.append(np.zeros(47, int), -1)), client, ("y runs from -1",)
    ),
    "client: labels in two dimensions": Case(
        arrays("client.npz", y=np.zeros((48, 1), int)), client, ("[48, 1]", "48 indices")
    ),
    "client: pixels as floats": Case(
        arrays("client.npz", x=np.zeros((48, 8, 8, 1))), client, ("float64", "uint8")
    ),
    "client: images of another size": Case(
        arrays("client.npz", x=np.zeros((48, 9, 8, 1), np.uint8)), client, ("[48, 9, 8, 1]",)
    ),
    "predict: a folder without images": Case(
        lambda site: (site / "empty").mkdir(), predict("empty"), ("empty", "no images there")
    ),
    "predict: a text file": Case(
        write("notes.txt", "hello"),
        predict("notes.txt"),
        ("notes.txt", "none of PNG, JPEG, BMP, WEBP"),
    ),
    "predict: a pipe": Case(
        lambda site: os.mkfifo(site / "p.png"), predict("p.png"), ("p.png", "is not a file")
    ),
    "predict: a link to a file outside": Case(
        link_out, predict("photos"), ("9.png", "link that leaves the folder")
    ),
    "join: labels of classes the model does not know": Case(
        nothing, joined(labels=np.array([0, 9])), ("labels run from 0 to 9", "0 to 3")
    ),
    "join: mode labels without labels": Case(nothing, joined(mode="labels"), ("no labels",)),
    "join: one labelled image": Case(
        nothing,
        joined(images=PIXELS[:1], labels=np.array([1]), mode="labels"),
        ("needs two images",),
    ),
    # partitions/
    "partition: an edited manifest": Case(
        edit("partitions/manifest.json", seen=5, new=3),
        partition,
        ("partitions", "fingerprint", "dvc repro partition"),
    ),
    "partition: a manifest that is a list": Case(
        write("partitions/manifest.json", "[]"), partition, ("manifest.json", "dvc repro partition")
    ),
    "partition: a manifest nested five thousand deep": Case(
        write("partitions/manifest.json", DEEP), partition, ("manifest.json", "nested too deeply")
    ),
    "partition: a number of clients in words": Case(
        edit("partitions/manifest.json", seen="six"), partition, ("manifest.json", "whole numbers")
    ),
    "partition: names that are numbers": Case(
        edit("partitions/manifest.json", names=list(range(8))), partition, ("list of strings",)
    ),
    "partition: an owner that does not exist": Case(
        npy("partitions/client.npy", last(8)), partition, ("partitions", "client")
    ),
    "partition: a header that claims 10**12 samples": Case(
        claim("partitions/client.npy", "(1000000000000,)"), partition, ("client.npy", "claims")
    ),
    "partition: of data with fewer samples": Case(
        remade(client=lambda c: c[:-9], split=lambda s: s[:-9]),
        partition,
        ("other data", "311 training samples", "320", "dvc repro partition"),
    ),
    "partition: of data with more test images": Case(
        remade(test_group=lambda g: np.append(g, g)), partition, ("96 test samples", "48")
    ),
    # models/
    "model: an expert holds NaN": Case(
        weights(EXPERT, "", hole), models, ("expert-0 holds NaN", "dvc repro train")
    ),
    "model: an expert of another architecture": Case(
        lambda site: save_file({"w": np.zeros(3, np.float32)}, site / "models" / EXPERT),
        models,
        ("expert-0.safetensors", "do not fit the model"),
    ),
    "model: an expert is missing": Case(
        drop("models/experts/expert-1.safetensors"), models, ("expert-1.safetensors", "No such")
    ),
    "model: a gate of another size": Case(
        weights(GATE, "gate", lambda g: g[:-1]), models, ("gate is float32 [16, 2]", "[17, 2]")
    ),
    "model: a gate that holds NaN": Case(weights(GATE, "gate", hole), models, ("gate holds NaN",)),
    "model: a head in double precision": Case(
        weights(GATE, "head", lambda h: h.astype(float)), models, ("head is float64", "float32")
    ),
    "model: an array that no model has": Case(
        lambda site: save_file({"x": np.zeros(3, np.float32)}, site / "models" / GATE),
        models,
        ("gate.safetensors", "'x'"),
    ),
    "model: images of a billion pixels a side": Case(
        edit(STATE, shape=[10**9, 10**9, 1]), models, ("shape.0", "16384")
    ),
    "model: images larger than the experts are for": Case(
        edit(STATE, shape=[8, 8, 3], mean=[0.5] * 3, std=[0.5] * 3), models, ("has shape",)
    ),
    "model: a deviation of zero": Case(edit(STATE, std=[0.0]), models, ("std.0", "greater than 0")),
    "model: two means for one channel": Case(
        edit(STATE, mean=[0.5, 0.5]), models, ("mean and std must have 1",)
    ),
    "model: label counts below zero": Case(
        edit(STATE, label_counts=[[-1, 1, 1, 1]] * 6), models, ("label_counts.0.0",)
    ),
    "model: a share of two": Case(edit(STATE, share=[2.0] * 6), models, ("share.0", "1")),
    "model: a correlation that is NaN": Case(
        edit(STATE, correlation=[[float("nan"), 1.0]] * 6), models, ("correlation.0.0", "finite")
    ),
    "model: feature groups of fewer clients": Case(
        edit(STATE, groups=[0]), models, ("groups must have shape (6,)",)
    ),
    "model: a temperature in words": Case(
        edit(STATE, calibration={"global.experts": "warm"}), models, ("calibration",)
    ),
    "model: a state nested five thousand deep": Case(
        write(STATE, DEEP), models, ("models", "nested too deeply")
    ),
    "model: an edit of a number within its range": Case(
        lambda site: (site / STATE).write_text(
            (site / STATE).read_text().replace('"round": 0', '"round": 1')
        ),
        models,
        ("not those that were written",),
    ),
    # requests
    "request: images of another size": Case(
        nothing, served({}, np.zeros((2, 9, 8, 1), np.uint8)), ("[2, 9, 8, 1]", "[n, 8, 8, 1]")
    ),
    "request: images as floats": Case(nothing, served({}, PIXELS / 255), ("float64", "uint8")),
    "request: no image": Case(nothing, served({}, PIXELS[:0]), ("[0, 8, 8, 1]",)),
    "request: more images than are taken": Case(
        nothing, served({}, np.zeros((16_385, 8, 8, 1), np.uint8)), ("16385 images", "16384")
    ),
    "request: a mode that does not exist": Case(
        nothing, served({"mode": "magic"}), ("'magic'", "unlabelled")
    ),
    "request: label counts of another length": Case(
        nothing, served({"mode": "labels", "label_counts": [1, 2]}), ("4 numbers >= 0",)
    ),
    "request: label counts below zero": Case(
        nothing, served({"mode": "labels", "label_counts": [-1, 1, 1, 1]}), ("4 numbers >= 0",)
    ),
    "request: label counts that are NaN": Case(
        nothing,
        served({"mode": "labels", "label_counts": [float("nan")] * 4}),
        ("label_counts must be a list of integers",),
    ),
    "request: label counts in words": Case(
        nothing,
        served({"mode": "labels", "label_counts": ["many"] * 4}),
        ("label_counts must be a list of integers",),
    ),
    "request: labels of classes the model does not know": Case(
        nothing, served({"mode": "labels", "labels": [0, 4]}), ("0 to 4", "0 to 3")
    ),
    "request: labels for another number of images": Case(
        nothing, served({"mode": "labels", "labels": [0, 1, 2]}), ("not 2 integers",)
    ),
    "request: inputs that are no base64": Case(
        nothing, served({"mode": "unlabelled", "inputs": "%%%"}), ("base64", "[i, 8, 8, 1]")
    ),
    "request: inputs cut in an image": Case(
        nothing,
        served({"mode": "unlabelled", "inputs": base64.b64encode(bytes(70)).decode()}),
        ("70 bytes", "multiple of 64"),
    ),
    "request: text among the pixels": Case(
        nothing, request({"inputs": [[["0", 1], [2, 3]]]}), ("integers", "nothing else")
    ),
    "request: rows of different lengths": Case(
        nothing, request({"inputs": [[[0, 1], [2]]]}), ("rows differ in length",)
    ),
    "request: nested five thousand deep": Case(
        nothing, request(b'{"inputs":' + b"[" * 5000), ("no JSON", "recursion")
    ),
    "request: a misspelt key": Case(
        nothing, request({"inputs": [1], "prams": {}}), ("prams is unknown",)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line_that_names_it_and_changes_nothing(site: Path, name: str) -> None:
    case = CASES[name]
    case.damage(site)
    before = snapshot(site)
    with pytest.raises((FedCoEError, MlflowException)) as caught:
        case.call(site)
    message = caught.value.message if isinstance(caught.value, MlflowException) else None
    message = message or str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    for words in case.said:
        assert words in message
    assert snapshot(site) == before


def test_the_whole_project_is_accepted_before_it_is_damaged(site: Path) -> None:
    for call in (settings, dataset, partition, models, client, own_images, own_arrays):
        call(site)
    for call in (predict("photos"), served({"mode": "unlabelled"}), joined()):
        call(site)


def test_a_long_text_in_a_request_takes_no_room_beyond_its_own(tmp_path: Path) -> None:
    body = json.dumps({"inputs": [["x" * 100_000], *([""] for _ in range(1000))]}).encode()
    tracemalloc.start()
    with pytest.raises(MlflowException, match="integers"):
        request(body)(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(body)


def test_every_case_has_its_row_in_the_documentation() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert [name for name in CASES if f"| {name} |" not in page] == []
    assert len(CASES) >= 60
