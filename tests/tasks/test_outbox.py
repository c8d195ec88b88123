"""Records on disk: torn, read twice, meant for another store."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.outbox import Outbox, outboxes

RUN = {"kind": "run", "name": "a run", "store": "here", "memo": None}


def metrics(step: int, **values: float) -> dict[str, object]:
    return {"kind": "metrics", "time": 1, "step": step, "values": values}


@pytest.fixture
def box(tmp_path: Path) -> Outbox:
    box = Outbox(tmp_path, "first")
    box.put(RUN)
    box.put(metrics(1, loss=2.0))
    return box


def test_what_is_put_is_read_by_another_process_in_order(box: Outbox) -> None:
    again = Outbox(box.root, "first")
    assert [record for record, _ in again.read()] == [RUN, metrics(1, loss=2.0)]
    assert again.has("loss@1") and again.has("run a run") and not again.has("loss@2")
    assert [found.name for found in outboxes(box.root)] == ["first"]


@pytest.mark.parametrize("torn", [b'{"kind": "metr', b"\xff\xfe", b"[1, 2]\n", b"\n"])
def test_a_line_that_a_kill_tore_is_left_out_and_spoils_no_other(box: Outbox, torn: bytes) -> None:
    with (box.folder / "records.jsonl").open("ab") as file:
        file.write(torn)
    again = Outbox(box.root, "first")
    assert len(list(again.read())) == 2
    again.put(metrics(2, loss=1.0))
    assert [record for record, _ in again.read()] == [
        RUN,
        metrics(1, loss=2.0),
        metrics(2, loss=1.0),
    ]


def test_a_place_is_of_one_store_and_another_store_gets_all(box: Outbox) -> None:
    [_, (_, end)] = box.read()
    box.note(replace(box.place("here"), run_id="7", offset=end))
    assert box.place("here").run_id == "7"
    assert not box.waiting("here")
    assert box.waiting("there") == Counter(run=1, metrics=1)
    assert box.place("there").run_id is None


@pytest.mark.parametrize("note", ["", "{", "[]", '{"store": "here", "more": 1}', "null"])
def test_a_note_that_is_lost_or_damaged_means_nothing_was_sent(box: Outbox, note: str) -> None:
    (box.folder / "sent").write_text(note)
    assert box.waiting("here") == Counter(run=1, metrics=1)


def test_it_is_deleted_only_when_all_arrived_and_no_run_will_add_to_it(box: Outbox) -> None:
    def arrived() -> None:
        [*_, (_, end)] = box.read()
        box.note(replace(box.place("here"), run_id="7", offset=end))

    box.discard("here")
    assert box.folder.exists()
    arrived()
    box.discard("here")
    assert box.folder.exists()  # its run has not ended: more will come
    box.put({"kind": "status", "status": "FINISHED", "time": 2})
    box.discard("here")
    assert box.folder.exists()
    arrived()
    box.discard("here")
    assert not box.folder.exists()

    kept = Outbox(box.root, "second")
    kept.put(RUN | {"memo": "memo"})
    (box.root / "memo").write_text("second")
    kept.note(replace(kept.place("here"), run_id="8", offset=next(kept.read())[1]))
    kept.discard("here")
    assert kept.folder.exists()
    (box.root / "memo").write_text("another")
    kept.discard("here")
    assert not kept.folder.exists()


def test_a_file_is_kept_whole_or_the_old_one_stays(box: Outbox) -> None:
    def write(text: str, fails: bool = False) -> None:
        def to(path: Path) -> None:
            path.write_text(text)
            if fails:
                raise OSError("disk full")

        box.keep("file", to)

    write("old")
    with pytest.raises(OSError, match="disk full"):
        write("half", fails=True)
    assert (box.files / "file").read_text() == "old"
    write("new")
    assert (box.files / "file").read_text() == "new"


def test_one_process_at_a_time_sends(box: Outbox) -> None:
    with box.sending() as mine, Outbox(box.root, "first").sending() as also:
        assert mine and not also
    with box.sending() as mine:
        assert mine
