"""The report: complete, honest about what is missing, the same bytes each time, safe to open."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedcoe.errors import FedCoEError
from tasks.report import build_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<script>alert(1)</script>"
REQUIRED = [
    "models/state.json",
    "partitions/manifest.json",
    *(f"metrics/{name}.json" for name in ("train", "evaluate", "cold_start")),
    *(f"plots/{name}.csv" for name in ("curves", "clients", "new_clients", "experts")),
]
RunWriter = Callable[..., Path]


def test_report_shows_headline_accuracies_and_their_differences(make_run: RunWriter) -> None:
    page = build_report(make_run())
    assert "unlabelled inputs only (100 images of 2 clients)" in page.read_text()
    text = page.read_text()
    assert page.parts[-2:] == ("reports", "index.html")
    cards = re.findall(r"<article.*?</article>", text, re.S)
    for card, ours, theirs, gain in zip(
        cards, ("71.2", "91.2", "80.0"), ("66.4", "86.4", "77.0"), ("4.8", "4.8", "3.0"),
        strict=True,
    ):  # fmt: skip
        assert f">{ours}<" in card and f"{theirs} %" in card and f"(+{gain} points)" in card
    assert "FedCoE on mnist5k" in text and "412.3" in text and "3 redraws" in text


def test_report_is_byte_identical_for_identical_inputs(make_run: RunWriter, tmp_path: Path) -> None:
    root = make_run(clients=8)
    first = build_report(root).read_bytes()
    elsewhere = shutil.copytree(root, tmp_path / "another" / "place")
    assert build_report(elsewhere).read_bytes() == first
    assert str(tmp_path).encode() not in first


def test_report_follows_its_inputs(make_run: RunWriter) -> None:
    root = make_run(clients=8)
    first = build_report(root).read_text()
    table = pd.read_csv(root / "plots/clients.csv")
    table.assign(accuracy=0.1234).to_csv(root / "plots/clients.csv", index=False)
    assert "12.3 %" not in first and "12.3 %" in build_report(root).read_text()


def test_report_asks_nothing_of_the_network(make_run: RunWriter) -> None:
    text = build_report(make_run()).read_text()
    links = re.findall(r"""(?:href|src|action)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", text)
    assert all(a.startswith(("#", "data:")) or b.startswith("#") for a, b in links)


@pytest.mark.parametrize("missing", REQUIRED)
def test_a_missing_input_is_named_with_the_next_step(make_run: RunWriter, missing: str) -> None:
    root = make_run()
    (root / missing).unlink()
    with pytest.raises(FedCoEError, match=re.escape(missing)) as caught:
        build_report(root)
    assert "\n" not in str(caught.value)
    assert "dvc repro" in str(caught.value)
    assert not (root / "reports").exists()


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("metrics/train.json", "{", "damaged"),
        ("metrics/evaluate.json", '{"method": "fedcoe"}', "lacks seed, global, personalized"),
        ("plots/experts.csv", "expert,load\n0,1.0\n", "lacks the column clients, accuracy"),
    ],
)
def test_a_damaged_input_is_named(make_run: RunWriter, path: str, content: str, words: str) -> None:
    root = make_run()
    (root / path).write_text(content)
    with pytest.raises(FedCoEError, match=f"{re.escape(path)}.*{words}.*dvc repro"):
        build_report(root)


def test_hostile_names_are_shown_and_never_run(make_run: RunWriter) -> None:
    root = make_run(names=[HOSTILE, '" onload="x', "NA"], classes=[HOSTILE, "$x$", "b&amp;"])
    text = build_report(root).read_text()
    assert HOSTILE not in text and html.escape(HOSTILE) in text
    assert text.count("<script") == 1
    assert not re.search(r"<[^>]*\sonload=\"x", text)
    assert re.search(r"<th[^>]*>NA</th>", text)


def test_report_without_a_baseline_compares_with_nothing(make_run: RunWriter) -> None:
    text = build_report(make_run(baseline=False)).read_text()
    assert not re.search("FedAvg(?!M,)", text) and "points)" not in text and "80.0" in text


def test_a_baseline_of_another_training_is_left_out_and_this_is_said(make_run: RunWriter) -> None:
    root = make_run()
    assert "seed, partition and switches (balanced softmax" in build_report(root).read_text()
    figures = json.loads((root / "metrics/evaluate.json").read_text())
    (root / "metrics/evaluate.json").write_text(json.dumps(figures | {"footing": "another"}))
    text = build_report(root).read_text()
    assert not re.search("FedAvg(?!M,)", text) and "points)" not in text
    assert "The baseline at hand had other settings or data" in text


def test_report_of_a_single_model_and_without_new_clients(make_run: RunWriter) -> None:
    root = make_run(experts=1, clients=6, baseline=False)
    (root / "metrics/cold_start.json").write_text("{}")
    (root / "plots/new_clients.csv").write_text("\n")
    (root / "data/dataset.json").unlink()
    text = build_report(root).read_text()
    assert "FedAvg on mnist5k" in text and "No client was held out" in text
    assert "<h2>Experts</h2>" not in text


def test_many_clients_and_classes_stay_a_page_a_phone_can_open(make_run: RunWriter) -> None:
    root = make_run(clients=1000, experts=8, classes=[f"class {c}" for c in range(100)])
    page = build_report(root)
    assert "the first 500 of 800" in page.read_text()
    assert page.stat().st_size < 1_500_000


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_report_opens_in_a_browser_without_errors_or_sideways_scrolling(
    make_run: RunWriter, tmp_path: Path
) -> None:
    page = build_report(make_run(names=["a-name-that-goes-on-and-on-" * 4]))
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f"""<!doctype html><body><iframe src="{page.as_uri()}" style="width:375px;height:900px"
        onload="const d = this.contentDocument;
        for (const button of d.querySelectorAll('th button')) button.click();
        const open = d.querySelector('details'); open.open = true;
        const first = d.querySelector('table.sortable tbody tr').cells[1].textContent;
        document.body.append('WIDTH=' + d.documentElement.scrollWidth
          + ' OF=' + d.documentElement.clientWidth + ' SVGS=' + d.querySelectorAll('svg').length
          + ' TABLES=' + d.querySelectorAll('table').length
          + ' BUTTONS=' + d.querySelectorAll('th button').length
          + ' CAPTIONS=' + d.querySelectorAll('caption').length)"></iframe>"""
    )
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --allow-file-access-from-files --dump-dom "
        "--enable-logging=stderr --virtual-time-budget=3000"
    )
    opened = subprocess.run(
        [
            str(CHROMIUM),
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            wrapper.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    found = dict(re.findall(r"([A-Z]+)=(\d+)", opened.stdout))
    assert "CONSOLE" not in opened.stderr, opened.stderr
    assert int(found["WIDTH"]) <= int(found["OF"]) <= 375
    assert found["SVGS"] == "5"  # the learning curves stand there twice, for wide and narrow
    assert found["TABLES"] == found["CAPTIONS"] == "6"
    assert int(found["BUTTONS"]) == 8 + 9


def test_the_footing_is_that_of_files_and_knows_faults_and_privacy() -> None:
    from fedcoe.config import validate_settings
    from tasks.files import footing

    def found(**sections: Any) -> str:
        return footing(validate_settings(sections, "test").model_dump(mode="json"), "d", "p")

    plain = found()
    assert found(train={"lr": 0.0123456789}) == found(train={"lr": 0.012346}) != plain
    assert found(faults={"dropout": 0.5}) != plain != found(privacy={"epsilon": 8.0})
    assert found(method={"ridge": 1e-3}) != plain
    assert found(method={"experts": 2}) == plain
