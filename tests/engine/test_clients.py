from dataclasses import replace

import numpy as np
import pytest

from fedcoe.data.feature_skew import apply_skew
from fedcoe.engine.clients import TEST, TRAIN, VALIDATION, ClientData


def test_images_and_labels_are_those_the_partition_names_in_one_order(world):
    for client in range(world.partition.clients):
        for split in (TRAIN, VALIDATION, TEST):
            rows = np.flatnonzero(
                (world.partition.client == client) & (world.partition.split == split)
            )
            images = world.data.images(client, split)
            np.testing.assert_array_equal(images, world.dataset.x_train[rows])
            labels = world.data.labels(client, split)
            np.testing.assert_array_equal(labels, world.dataset.y_train[rows])


def test_train_is_the_training_split_and_writable(world):
    images, labels = world.data.train(2)
    np.testing.assert_array_equal(images, world.data.images(2, TRAIN))
    np.testing.assert_array_equal(labels, world.data.labels(2, TRAIN))
    images[0] = 0
    assert world.data.images(2, TRAIN)[0].any()


@pytest.fixture
def rotated(world):
    groups = np.arange(world.partition.clients) % 4
    test_group = np.arange(len(world.dataset.y_test)) % 4
    partition = replace(world.partition, group=groups, test_group=test_group, skew="rotation")
    return ClientData(world.dataset, partition)


def test_every_split_of_a_client_is_shown_in_its_feature_group(world, rotated):
    for client in (0, 1, 6):
        for split in (TRAIN, VALIDATION, TEST):
            plain = world.data.images(client, split)
            expected = np.rot90(plain, client % 4, axes=(1, 2))
            np.testing.assert_array_equal(rotated.images(client, split), expected)


def test_test_images_are_shown_in_the_groups_they_were_given(world, rotated):
    rows = np.array([0, 5, 2, 7, 3])
    found = rotated.global_test(rows)
    for image, row in zip(found, rows, strict=True):
        plain = np.array(world.dataset.x_test[row : row + 1])
        np.testing.assert_array_equal(image, apply_skew(plain, "rotation", row % 4)[0])
    np.testing.assert_array_equal(world.data.global_test(rows), world.dataset.x_test[rows])
