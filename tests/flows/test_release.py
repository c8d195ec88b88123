"""Candidate against champion: a worse one is refused, a better one promoted, one of two wins."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcoe.errors import FedCoEError

WORSE = ["train.rounds=1", "train.lr=1e-5", "method.experts=3"]


@pytest.fixture(scope="module")
def trained_twice(
    new_project: Callable[..., Path], run_training: Callable[..., dict[str, float]]
) -> Path:
    """Version 1 is made worse on purpose, with three experts; version 2 has two."""
    # A coordination head does well on features that were never trained.
    root = new_project(method={"coordination_head": False})
    run_training(root, WORSE)
    run_training(root)
    return root


@pytest.fixture
def registry(trained_twice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A copy of the project's MLflow database, and a client of it."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    shutil.copy(trained_twice / ".fedcoe/mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(uri)


def champions(registry: Any) -> dict[str, str]:
    return {
        model.name: str(model.aliases["champion"])
        for model in registry.search_registered_models()
        if "champion" in model.aliases
    }


FIRST = {"fedcoe": "1", "fedcoe-gate": "1"} | {f"fedcoe-expert-{m}": "1" for m in range(3)}
SECOND = {"fedcoe": "2", "fedcoe-gate": "2"} | {f"fedcoe-expert-{m}": "2" for m in range(2)}


def test_the_first_is_promoted_then_a_better_one_and_a_worse_one_is_refused(
    trained_twice: Path, registry: Any, prefect_api: str
) -> None:
    from prefect.artifacts import Artifact

    from flows.release import release

    first = release(str(trained_twice), "1")
    assert (first["verdict"], first["champion"], first["table"]) == ("promoted", None, [])
    assert champions(registry) == FIRST

    better = release(str(trained_twice))
    assert (better["verdict"], better["champion"], better["version"]) == ("promoted", "1", "2")
    # Expert 2 has no successor: nobody may take the old one for the champion's.
    assert champions(registry) == SECOND

    worse = release(str(trained_twice), "1")
    assert (worse["verdict"], worse["promoted"]) == ("refused", False)
    assert champions(registry) == SECOND
    assert {row["verdict"] for row in worse["table"]} & {"falls"}

    version = registry.get_model_version("fedcoe", "1")
    assert version.tags["release_verdict"] == "refused"
    assert version.tags["release_champion"] == "2"
    assert json.loads(version.tags["release_table"]) == worse["table"]
    assert registry.get_run(version.run_id).data.tags["release_verdict"] == "refused"
    page = str(Artifact.get("release-verdict").data)
    assert page.startswith("# Version 1: refused")
    assert all(row["figure"] in page for row in worse["table"])

    with pytest.raises(FedCoEError, match="champion already"):
        release(str(trained_twice), "2")


def test_promotion_and_rollback_by_hand_move_all_parts_together(registry: Any) -> None:
    from tasks.release import aliased, move_alias, rollback_champion

    with pytest.raises(FedCoEError, match="no champion"):
        rollback_champion()
    move_alias("champion", "1", None)
    with pytest.raises(FedCoEError, match="first champion"):
        rollback_champion()
    move_alias("champion", "2", "1")
    assert champions(registry) == SECOND
    assert rollback_champion() == ("2", "1")
    assert champions(registry) == FIRST
    with pytest.raises(FedCoEError, match="first champion"):
        rollback_champion()
    move_alias("candidate", "1", aliased("candidate"))
    assert registry.get_model_version_by_alias("fedcoe-expert-1", "candidate").version == 1
    assert champions(registry) == FIRST
    with pytest.raises(FedCoEError, match=r"no version 9.*there are: 1, 2"):
        move_alias("champion", "9", "1")


@pytest.fixture
def succeeded(registry: Any) -> Any:
    """The registry after two releases: version 1 was the champion, version 2 is."""
    from tasks.release import move_alias

    move_alias("champion", "1", None)
    move_alias("champion", "2", "1")
    return registry


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_rollback_after_a_kill_between_note_and_move_goes_to_the_last_real_champion(
    succeeded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import release

    with monkeypatch.context() as broken:
        broken.setattr(release, "point", killed)
        with pytest.raises(KeyboardInterrupt):
            release.move_alias("champion", "1", "2")
    assert champions(succeeded) == SECOND
    assert release.rollback_champion() == ("2", "1")


def test_a_champion_set_in_the_registrys_own_ui_can_be_rolled_back(registry: Any) -> None:
    from tasks.release import move_alias, rollback_champion

    move_alias("champion", "1", None)
    registry.set_registered_model_alias("fedcoe", "champion", "2")
    assert rollback_champion() == ("2", "1")
    assert champions(registry) == FIRST


def test_what_a_run_registers_becomes_candidate_as_a_whole(registry: Any) -> None:
    named = {
        m.name: str(m.aliases.get("candidate", "")) for m in registry.search_registered_models()
    }
    # Expert 2 is of the run before.
    assert named == SECOND | {"fedcoe-expert-2": ""}
    # Last: a release that finds its version finds those of its parts.
    versions = registry.search_model_versions("")
    last = max((v for v in versions if v.name != "fedcoe"), key=lambda v: v.creation_timestamp)
    whole = registry.get_model_version("fedcoe", "2")
    assert whole.creation_timestamp >= last.creation_timestamp


def test_a_rollback_killed_half_way_is_completed_by_the_same_command(
    succeeded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import release

    with monkeypatch.context() as broken:
        # At the mixture, the last step of a move.
        broken.setattr(
            "mlflow.MlflowClient.set_registered_model_alias",
            lambda self, name, *rest: killed() if name == "fedcoe" else None,
        )
        with pytest.raises(KeyboardInterrupt):
            release.rollback_champion()
    assert champions(succeeded)["fedcoe"] == "2"
    assert release.rollback_champion() == ("2", "1")
    assert champions(succeeded) == FIRST


def test_a_version_is_graded_with_the_normalisation_it_was_trained_with(
    trained_twice: Path, registry: Any, tmp_path: Path
) -> None:
    from tasks.release import grade_model

    root = tmp_path / "project"
    shutil.copytree(trained_twice, root, ignore=shutil.ignore_patterns(".fedcoe"))

    def hits() -> list[dict[str, list[bool]]]:
        graded = grade_model.fn(root, "2")
        return [{name: list(found) for name, found in one.hits.items()} for one in graded]

    before = hits()
    about = json.loads((root / "data/dataset.json").read_text())
    about |= {"mean": [0.9], "std": [0.02]}
    (root / "data/dataset.json").write_text(json.dumps(about))
    assert hits() == before


RACER = """
import sys, time
from mlflow import MlflowClient
from fedcoe.errors import FedCoEError
from tasks import release
seen = release.aliased("champion")
slow = release.point
def point(*args):
    time.sleep(1)  # without the lock both would have compared by now
    slow(*args)
release.point = point
print("ready", flush=True)
sys.stdin.readline()
try:
    release.move_alias("champion", sys.argv[1], seen)
    print("won")
except FedCoEError as error:
    print(f"lost: {error}")
"""


def test_of_two_processes_that_release_at_once_one_wins(registry: Any) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, version],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for version in ("1", "2")
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        said = [racer.communicate(timeout=300)[0] for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
    winner = said.index("won\n")
    assert "lost: champion moved from version none to" in said[1 - winner]
    assert champions(registry) == (FIRST, SECOND)[winner]
    assert json.loads(registry.get_registered_model("fedcoe").tags["champion_history"]) == [
        str(winner + 1)
    ]


def test_a_folder_of_another_users_in_the_temporary_one_holds_up_no_release_it_is_said(
    registry: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tasks.release import _alone

    monkeypatch.setattr("mlflow.get_tracking_uri", lambda: "http://127.0.0.1:9")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    with _alone():
        assert (tmp_path / f"fedcoe-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("os.getuid", lambda: 12345)
    planted = tmp_path / "fedcoe-12345"
    for plant in (planted.mkdir, lambda: planted.symlink_to("nowhere")):
        plant()
        with pytest.raises(FedCoEError, match="fedcoe-12345: is no folder of yours"), _alone():
            pass
        planted.rmdir() if planted.is_dir() else planted.unlink()


def test_a_version_for_other_images_is_not_compared(
    trained_twice: Path, registry: Any, tmp_path: Path
) -> None:
    from tasks.release import grade_model

    shutil.copytree(trained_twice, tmp_path / "other", ignore=shutil.ignore_patterns(".fedcoe"))
    info = tmp_path / "other/data/dataset.json"
    values = json.loads(info.read_text())
    values["classes"][0] = "naught"
    info.write_text(json.dumps(values))
    with pytest.raises(FedCoEError, match="nothing to compare"):
        grade_model.fn(tmp_path / "other", "2")


def test_an_expert_whose_number_is_not_its_mixtures_says_whose_it_is(
    trained_twice: Path, registry: Any, fedcoe_here: Callable[..., Any], tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    # As after a training of one expert between two of more.
    [first, second] = [registry.get_model_version("fedcoe", v).run_id for v in ("1", "2")]
    source = registry.get_model_version("fedcoe-expert-1", "2").source
    MlflowClient().create_model_version("fedcoe-expert-2", source, second)
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    rows = json.loads(fedcoe_here(trained_twice, "experts", "--json", **environment).stdout)
    found = {(row["name"], row["version"]): row["mixture"] for row in rows}
    assert found["fedcoe-expert-2", "1"] == "1" and found["fedcoe-expert-2", "2"] == "2"
    MlflowClient().create_model_version("fedcoe-expert-2", source, first)
    table = fedcoe_here(trained_twice, "experts", **environment).stdout
    assert "3 of 1" in table


def test_both_aliases_of_a_version_are_listed(
    trained_twice: Path,
    registry: Any,
    tmp_path: Path,
    fedcoe_here: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    from tasks.release import move_alias

    move_alias("champion", "2", None)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    shown = fedcoe_here(trained_twice, "experts", COLUMNS="220", MLFLOW_TRACKING_URI=uri)
    lines = [line.split() for line in shown.stdout.splitlines()]
    [at] = [i for i, words in enumerate(lines) if words[:2] == ["fedcoe", "2"]]
    assert lines[at][2] == "candidate" and lines[at + 1] == ["champion"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("release",), "no candidate"),
        (("release", "3"), "no version 3 of fedcoe is registered"),
        (("promote", "3"), "no version 3 of fedcoe is registered"),
        (("promote", "3", "--to", "queen"), "champion, candidate"),
        (("rollback",), "no champion"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    mlflow_database: Path,
    prefect_api: str,
    fedcoe_here: Callable[..., subprocess.CompletedProcess[str]],
    args: tuple[str, ...],
    said: str,
) -> None:
    (tmp_path / ".fedcoe").mkdir()
    shutil.copy(mlflow_database, tmp_path / ".fedcoe/mlflow.db")
    done = fedcoe_here(tmp_path, *args)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1
