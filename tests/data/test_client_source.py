import numpy as np
import pytest
from PIL import Image

from fedcoe.data.sources.client import read_client
from fedcoe.errors import FedCoEError

SHAPE, CLASSES = (4, 6, 1), ("cat", "dog")
IMAGES = np.arange(2 * 24, dtype=np.uint8).reshape(2, 4, 6)


def save(path, value=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 6), value, np.uint8)).save(path)


def test_a_flat_folder_is_unlabelled(tmp_path):
    save(tmp_path / "b.png", 2)
    save(tmp_path / "a.png", 1)
    names, images, labels = read_client(tmp_path, SHAPE, CLASSES)
    assert (names, labels) == (["a.png", "b.png"], None)
    assert images.shape == (2, *SHAPE)
    assert images[:, 0, 0, 0].tolist() == [1, 2]


def test_sub_folders_are_classes_by_the_models_names(tmp_path):
    save(tmp_path / "dog" / "a.png", 1)
    save(tmp_path / "cat" / "b.png", 2)
    names, images, labels = read_client(tmp_path, SHAPE, CLASSES)
    assert names == ["cat/b.png", "dog/a.png"]
    assert labels.tolist() == [0, 1]
    assert images[:, 0, 0, 0].tolist() == [2, 1]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["cow/a.png"], "cow: is no class of the model .cat, dog."),
        (["x/cat/a.png"], "x/cat: lies deeper than one sub-folder a class; name the folder of one"),
        (["Cat/a.png"], "Cat: is spelled cat in the model"),
        (["a.png", "cat/b.png"], "both in it and in sub-folders"),
        ([], "holds no images"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path, files, said):
    for file in files:
        save(tmp_path / file)
    with pytest.raises(FedCoEError, match=said):
        read_client(tmp_path, SHAPE, CLASSES)


@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels")])
def test_arrays_are_read_under_either_name(tmp_path, names):
    np.savez(tmp_path / "a.npz", **{names[0]: IMAGES, names[1]: np.array([1, 0], np.uint8)})
    found = read_client(tmp_path / "a.npz", SHAPE, CLASSES)
    np.testing.assert_array_equal(found.images, IMAGES[..., None])
    assert found.labels.tolist() == [1, 0]
    assert found.labels.dtype == np.int64
    np.savez(tmp_path / "b.npz", **{names[0]: IMAGES})
    assert read_client(tmp_path / "b.npz", SHAPE, CLASSES).labels is None


def test_labels_may_be_names_of_classes(tmp_path):
    np.savez(tmp_path / "a.npz", x=IMAGES, y=np.array(["dog", "cat"]))
    assert read_client(tmp_path / "a.npz", SHAPE, CLASSES).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"y": np.zeros(2, np.int64)}, "no array x"),
        ({"x": IMAGES, "images": IMAGES}, "both x and images"),
        ({"x": IMAGES, "z": IMAGES}, "unknown array 'z'"),
        ({"x": IMAGES.astype(np.float32)}, "must be uint8"),
        ({"x": IMAGES[:, :3]}, r"takes \[n, 4, 6, 1\]"),
        ({"x": IMAGES[:0]}, r"takes \[n, 4, 6, 1\]"),
        ({"x": IMAGES, "y": np.zeros(3, np.int64)}, "must be 2 indices or names"),
        ({"x": IMAGES, "y": np.zeros(2)}, "must be 2 indices or names"),
        ({"x": IMAGES, "y": np.array([0, 2])}, "0 to 1 .cat, dog."),
        ({"x": IMAGES, "y": np.array(["cat", "cow"])}, "'cow', no class"),
        ({"x": IMAGES, "y": np.array(["cat", None])}, "Python objects"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_in_one_line(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(FedCoEError, match=said) as caught:
        read_client(tmp_path / "a.npz", SHAPE, CLASSES)
    assert str(tmp_path / "a.npz") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 not a zip"])
def test_what_is_no_folder_and_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "client.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FedCoEError, match=r"client\.npz"):
        read_client(path, SHAPE, CLASSES)
