"""The smallest real images there are: scikit-learn's 8x8 digits, for tests and first steps."""

from pathlib import Path

import numpy as np

from fedcoe.data.dataset import RawDataset

NAMES = ("digits",)


def build(name: str, download_dir: Path, *, check_md5: bool = True) -> RawDataset:
    """1,797 images, 8x8x1, in the package's order; the last fifth of every class is the test.

    The package's grey levels 0..16 become 0..255.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        test[members[len(members) - round(0.2 * len(members)) :]] = True
    return RawDataset(
        x_train=images[~test],
        y_train=labels[~test],
        x_test=images[test],
        y_test=labels[test],
        classes=tuple("0123456789"),
        source="UCI Optical Recognition of Handwritten Digits (test part), as in scikit-learn",
        licence="CC BY 4.0 (UCI); scikit-learn, which ships it, BSD-3-Clause",
    )
