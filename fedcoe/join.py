"""A client that arrives today: what each expert is worth to it, its class mix, its predictions.

Nothing is trained. Where the client brings labels, every mode is graded; mode `labels` is graded
on labels it has not read: it reads one half of the images to predict the other, and the other way
round. `none` and `unlabelled` read no labels, so they need no split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcoe.bundle import Bundle, check_labels
from fedcoe.cold_start import MODES, Mode, predict_labels, predict_none, predict_unlabelled
from fedcoe.errors import FedCoEError
from fedcoe.methods.base import Scores
from fedcoe.metrics import tally
from fedcoe.prediction import Log, sample_losses
from fedcoe.streams import stream

SPLIT = "two halves, classes alike in both; each half is predicted from the labels of the other"


@dataclass(frozen=True)
class Joined:
    """What is found out about a client with n images; C classes, M experts."""

    mode: Mode
    """That of `log_p`."""
    log_p: Log
    """[n, C] log probabilities."""
    experts: list[dict[str, Any]]
    """Per expert: its correlation with the client by the gate, and the accuracy that mode
    `unlabelled` expects of it; with labels the correlation by losses, accuracy and mean loss."""
    class_mix: NDArray[np.float64]
    """[C], estimated without labels."""
    label_mix: NDArray[np.float64] | None
    """[C], counted."""
    modes: dict[str, dict[str, float]]
    """Mode to accuracy and nll over all n images; empty without labels."""

    def rows(self, names: Sequence[str], classes: Sequence[str]) -> list[dict[str, Any]]:
        """One row an image: its name, class, that class's probability."""
        best = self.log_p.argmax(axis=1)
        p = np.exp(self.log_p.max(axis=1))
        return [
            {"image": name, "class": classes[int(c)], "p": float(v)}
            for name, c, v in zip(names, best, p, strict=True)
        ]

    def class_rows(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """One row a class: its estimated share, images predicted to be of it, counted share."""
        predicted = np.bincount(self.log_p.argmax(axis=1), minlength=len(classes))
        return [
            {
                "class": name,
                "estimated": float(self.class_mix[c]),
                "predicted": int(predicted[c]),
                "counted": None if self.label_mix is None else float(self.label_mix[c]),
            }
            for c, name in enumerate(classes)
        ]

    def summary(self, classes: Sequence[str]) -> dict[str, Any]:
        """All but the predictions, for JSON."""
        return {
            "images": len(self.log_p),
            "mode": self.mode,
            "experts": self.experts,
            "classes": self.class_rows(classes),
            "modes": self.modes,
            "labels_split": SPLIT if "labels" in self.modes else None,
        }


def join(
    bundle: Bundle,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None = None,
    mode: Mode | None = None,
) -> Joined:
    """Take a client in.

    Args:
        images: uint8 [n, H, W, C].
        labels: [n], or None.
        mode: of the predictions; default: `labels` with labels, else `unlabelled`.

    Raises:
        FedCoEError: images or labels that do not fit the model; mode `labels` without labels or
            with fewer than two images.
    """
    bundle.check_whole()
    method, state = bundle.method, bundle.state
    if mode not in (None, *MODES):
        raise FedCoEError(f"mode {mode!r}: there are {', '.join(MODES)}")
    if mode == "labels" and labels is None:
        raise FedCoEError("mode labels: the client's data has no labels")
    scores = bundle.score(images)
    predictions = {
        "none": predict_none(method, state, scores),
        "unlabelled": predict_unlabelled(method, state, scores, scores),
    }
    label_mix = None
    if labels is not None:
        labels = check_labels(labels, len(images), method.federation.classes)
        label_mix = np.bincount(labels, minlength=method.federation.classes) / len(labels)
        if len(images) > 1:
            predictions["labels"] = _crosswise(bundle, scores, labels)
        elif mode == "labels":
            raise FedCoEError("mode labels reads one half to predict the other: needs two images")
    chosen: Mode = mode or ("labels" if "labels" in predictions else "unlabelled")
    return Joined(
        chosen,
        predictions[chosen],
        _experts(bundle, scores, predictions["unlabelled"], labels),
        # Where the prior is fitted by EM, the mean posterior is that prior: its fixed point.
        np.exp(predictions["unlabelled"]).mean(axis=0),
        label_mix,
        {} if labels is None else {name: _grade(p, labels) for name, p in predictions.items()},
    )


def halves(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of two halves that have the same number of every class, but for one; sorted."""
    shuffled = stream(0, "join halves").permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return np.sort(by_class[0::2]), np.sort(by_class[1::2])


def _crosswise(bundle: Bundle, scores: Scores, labels: NDArray[np.int64]) -> Log:
    log_p = np.empty(scores.experts.shape[1:], np.float64)
    first, second = halves(labels)
    for read, predicted in ((first, second), (second, first)):
        log_p[predicted] = predict_labels(
            bundle.method, bundle.state, scores.rows(predicted), scores.rows(read), labels[read]
        )
    return log_p


def _experts(
    bundle: Bundle, scores: Scores, mixture: Log, labels: NDArray[np.int64] | None
) -> list[dict[str, Any]]:
    method, state = bundle.method, bundle.state
    choice = scores.experts.argmax(axis=2)
    believed = np.take_along_axis(np.exp(mixture), choice.T, axis=1)
    columns: dict[str, NDArray[np.floating]] = {
        "correlation": method.join_unlabelled(state, scores)[1],
        "expected_accuracy": believed.mean(axis=0),
    }
    if labels is not None:
        columns |= {
            "correlation_by_labels": method.join_labelled(state, scores, labels)[1],
            "accuracy": (choice == labels).mean(axis=1),
            "loss": sample_losses(scores.experts, labels).mean(axis=0),
        }
    return [
        {"expert": m} | {name: float(column[m]) for name, column in columns.items()}
        for m in range(method.experts)
    ]


def _grade(log_p: Log, labels: NDArray[np.int64]) -> dict[str, float]:
    found = tally(log_p, labels)
    return {"accuracy": found.accuracy, "nll": found.nll / found.count}
