"""Clients' data as a worker sees it: memory-mapped arrays and an index, nothing copied early."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcoe.data.dataset import Dataset
from fedcoe.data.feature_skew import apply_skew
from fedcoe.data.partition import TEST, TRAIN, VALIDATION, Partition
from fedcoe.errors import FedCoEError

__all__ = ["TEST", "TRAIN", "VALIDATION", "ClientData"]


@dataclass(frozen=True)
class ClientData:
    """Images and labels by client and split, with the client's feature skew applied.

    Raises:
        FedCoEError: the partition deals another number of samples than the dataset has.
    """

    dataset: Dataset
    partition: Partition

    def __post_init__(self) -> None:
        for split, dealt, held in (
            ("training", self.partition.client, self.dataset.y_train),
            ("test", self.partition.test_group, self.dataset.y_test),
        ):
            if len(dealt) != len(held):
                raise FedCoEError(
                    f"the partition is of other data: it has {len(dealt)} {split} samples, "
                    f"{self.dataset.info.name} has {len(held)}; run `dvc repro partition`"
                )

    def images(self, client: int, split: int) -> NDArray[np.uint8]:
        """[n, H, W, C] of one client's split, in the order of the sample index."""
        rows = self.partition.indices(client, split)
        group = int(self.partition.group[client])
        return apply_skew(self.dataset.x_train[rows], self.partition.skew, group)

    def labels(self, client: int, split: int) -> NDArray[np.int64]:
        """[n], in the order of `images`."""
        return np.asarray(self.dataset.y_train[self.partition.indices(client, split)])

    def train_rows(self, client: int) -> NDArray[np.int64]:
        """[n] places of `train`'s samples in the dataset."""
        return self.partition.indices(client, TRAIN)

    def train(self, client: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        return self.images(client, TRAIN), self.labels(client, TRAIN)

    def global_test(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Rows of the official test set, each under the feature group it was given."""
        images = np.array(self.dataset.x_test[rows])
        groups = self.partition.test_group[rows]
        for group in np.unique(groups):
            mine = groups == group
            images[mine] = apply_skew(images[mine], self.partition.skew, int(group))
        return images
