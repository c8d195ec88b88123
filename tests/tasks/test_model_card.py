import json
import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from fedcoe.config import Settings, validate_settings
from fedcoe.data.dataset import DatasetInfo
from tasks.model_card import Lineage, card, expert_tags

INFO = DatasetInfo(
    name="shapes",
    classes=["round", "square", "a|b"],
    shape=[8, 8, 1],
    train=300,
    test=60,
    mean=[0.5],
    std=[0.2],
    clients=[],
    source="drawn",
    licence="CC0",
    hash="0123456789abcdef" * 4,
)
ROW = {
    "expert": 1,
    "load": 0.25,
    "clients": 3,
    "accuracy": 0.6,
    "accuracy_class_round": 0.987654,
    "accuracy_class_square": 0.25,
    "accuracy_class_a|b": float("nan"),
}
CLIENTS = [
    {"client": "ann", "accuracy": 1.0, "expert_accuracy_0": 0.5, "expert_accuracy_1": 0.75},
    {"client": "bob", "accuracy": 1.0, "expert_accuracy_0": 0.9, "expert_accuracy_1": 0.1},
    {"client": "cid", "accuracy": 1.0, "expert_accuracy_0": 0.8, "expert_accuracy_1": 0.8},
    {"client": "dot", "accuracy": 1.0, "expert_accuracy_0": 0.0, "expert_accuracy_1": 0.0},
]
SHARED = {
    "accuracy_global": "0.9000",
    "accuracy_personalized": "0.9500",
    "accuracy_cold_unlabelled": "0.8800",
}


@pytest.fixture
def lineage() -> Lineage:
    settings: Settings = validate_settings({"train": {"rounds": 7, "seed": 4}}, "test")
    return Lineage(settings, INFO, "feedbeef", 16, 4, "c0ffee+changes", "run17")


@pytest.fixture
def tags() -> dict[str, str]:
    own = {"accuracy": "0.6000", "load": "0.2500", "clients": "3"}
    return SHARED | own | expert_tags(ROW, CLIENTS, 1234, 0.5678)


def test_an_experts_tags_are_its_classes_clients_drift_and_size(tags: dict[str, str]) -> None:
    assert json.loads(tags["accuracy_by_class"]) == {"round": 0.9877, "square": 0.25}
    # Better than every other expert or as good, best first; who is right never serves nobody best.
    assert tags["serves_best"] == "cid (0.80), ann (0.75)"
    assert (tags["drift"], tags["parameters"], tags["bytes"]) == ("0.568", "1234", "4936")


def test_long_lists_are_cut_so_that_stores_take_them(lineage: Lineage) -> None:
    many = [{**CLIENTS[0], "client": f"client-{k:04d}"} for k in range(500)]
    row = ROW | {f"accuracy_class_thing number {c}": c / 1000 for c in range(1000)}
    found = expert_tags(row, many, 10, 0.0)
    assert found["serves_best"].endswith("client-0009 (0.75) and 490 more")
    assert "accuracy_by_class" not in found
    text = card(
        "fedcoe-expert-1",
        replace(lineage, info=INFO.model_copy(update={"classes": [f"c{i}" for i in range(1000)]})),
        SHARED | {"accuracy": "0.6", "load": "0.25", "clients": "3"} | found,
        row,
    )
    assert len(text) < 5000
    assert "The best and the worst 10 of 1002 classes." in text


def test_an_experts_card_says_use_data_figures_limits_and_lineage(
    lineage: Lineage, tags: dict[str, str]
) -> None:
    text = card("fedcoe-expert-1", lineage, tags, ROW)
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["Intended use", "Data", "Figures", "Limits", "Lineage"]
    for said in (
        "uint8 images [n, 8, 8, 1]",
        "shapes (drawn; licence: CC0)",
        "16 clients that trained and 4 that did not",
        "| this expert alone, accuracy on the test set | 60.00 % |",
        "| clients it serves best, of all experts alone | cid (0.80), ann (0.75) |",
        "| mixture, new clients, unlabelled images read | 88.00 % |",
        "| round | 98.8 % |",
        "most images of these classes wrong: square.",
        "`0123456789abcdef`",
        "`feedbeef`",
        "`c0ffee+changes`",
        "`run17`",
        "7 rounds",
        "training 4",
    ):
        assert said in text, said


def test_names_that_data_brought_along_are_text_on_a_card_not_images_or_links(
    lineage: Lineage, tags: dict[str, str]
) -> None:
    bad = "![x](https://elsewhere/b.png) <<img src=y> [here](z) # `w` www.v.com"
    row = ROW | {f"accuracy_class_{bad}": 0.1}
    info = INFO.model_copy(
        update={"name": bad, "source": bad, "licence": bad, "classes": [bad, "round"]}
    )
    text = card("fedcoe-expert-1", replace(lineage, info=info), tags | {"serves_best": bad}, row)
    shown = MarkdownIt("commonmark").enable("table").render(text)
    assert "https://elsewhere/b.png" in shown
    assert not re.search("<(img|a) ", shown)
    # MLflow's renderer makes images and links of more than this one does.
    assert not any(mark in text for mark in ("<img", "://", "www."))


def test_the_mixtures_card_has_no_experts_figures(lineage: Lineage) -> None:
    text = card("fedcoe", lineage, SHARED)
    assert "The whole mixture" in text and "they stay with their clients" in text
    assert "this expert" not in text
    assert "probability of each expert" in card("fedcoe-gate", lineage, SHARED)
