import json
from dataclasses import replace

import numpy as np
import pytest

from fedcoe.bundle import export_models, layout_of, load_bundle
from fedcoe.errors import FedCoEError
from fedcoe.state import PersonalStore

NEURAL = {"gate": "neural", "coordination_head": False}


@pytest.fixture(params=["analytic", "neural", "fedavg"])
def trained(request, make_method, engine, train, tmp_path):
    """Method, state, side and the folder of the exported models."""
    kinds = {"analytic": {}, "neural": NEURAL, "fedavg": {"name": "fedavg"}}
    return export(make_method(**kinds[request.param]), engine, train, tmp_path)


@pytest.fixture
def mixture(make_method, engine, train, tmp_path):
    return export(make_method(), engine, train, tmp_path)


def export(method, engine, train, tmp_path):
    state = train(engine, method, 2)
    calibration = {"global.experts": 0.6, "client.experts": 0.4, "client.gate": 3.0}
    state = replace(state, calibration=calibration, share=np.linspace(0, 1, 6))
    side = engine.run(lambda side: side)
    export_models(tmp_path / "models", method, state, side.personal)
    return method, state, side, tmp_path / "models"


def test_a_loaded_run_predicts_bit_for_bit_what_the_trained_one_does(trained):
    method, state, side, folder = trained
    bundle = load_bundle(folder, "fp32")
    images = np.array(side.data.dataset.x_test)
    scores = method.score(side.trainer, state, images)

    none = method.predict_global(state, scores)
    assert bundle.predict(images).tobytes() == none.tobytes()

    prior, c = method.join_unlabelled(state, scores)
    expected = method.predict_with(state, scores, prior, c)
    assert bundle.predict(images, "unlabelled").tobytes() == expected.tobytes()

    inputs = method.score(side.trainer, state, images[:20])
    prior, c = method.join_unlabelled(state, inputs)
    expected = method.predict_with(state, scores, prior, c)
    found = bundle.predict(images, "unlabelled", inputs=images[:20])
    assert found.tobytes() == expected.tobytes()


def test_label_counts_become_the_label_prior(mixture):
    method, state, side, folder = mixture
    images = np.array(side.data.dataset.x_test)
    bundle = load_bundle(folder, "fp32")
    scores = method.score(side.trainer, state, images)
    _, c = method.join_unlabelled(state, scores)
    prior = np.array([9.1, 0.1, 1.1, 0.1]) / 10.4
    expected = method.predict_with(state, scores, prior, c)
    found = bundle.predict(images, "labels", label_counts=np.array([9, 0, 1, 0]))
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(
    "counts",
    [
        None,
        [1, 2],
        [1, -1, 0, 0],
        [1.0, np.nan, 0.0, 0.0],
        [np.inf, 1.0, 1.0, 1.0],
        ["1", "2", "3", "4"],
    ],
)
def test_mode_labels_needs_one_count_a_class(mixture, counts):
    _, _, side, folder = mixture
    with pytest.raises(FedCoEError, match="4 numbers >= 0"):
        load_bundle(folder).predict(side.data.dataset.x_test, "labels", counts)


@pytest.mark.parametrize(
    ("mode", "given"),
    [
        ("none", {"labels": [0]}),
        ("none", {"inputs": [0]}),
        ("unlabelled", {"label_counts": [1, 1, 1, 1]}),
    ],
)
def test_what_a_mode_does_not_read_is_refused_rather_than_left_out(mixture, mode, given):
    _, _, side, folder = mixture
    with pytest.raises(FedCoEError, match=f"{next(iter(given))} are for mode .*, not {mode}"):
        load_bundle(folder).predict(side.data.dataset.x_test, mode, **given)


def test_labels_and_counts_of_them_are_one_too_many(mixture):
    _, _, side, folder = mixture
    images = side.data.dataset.x_test[:2]
    with pytest.raises(FedCoEError, match="leave one out"):
        load_bundle(folder).predict(images, "labels", [1, 1, 0, 0], labels=[0, 1])


def test_lists_are_taken_as_arrays_are(mixture):
    _, _, side, folder = mixture
    bundle, images = load_bundle(folder, "fp32"), np.array(side.data.dataset.x_test[:6])
    labels = [0, 1, 2, 3, 0, 1]
    found = bundle.predict(images, "labels", labels=labels)
    assert found.tobytes() == bundle.predict(images, "labels", labels=np.array(labels)).tobytes()


def test_the_state_comes_back_with_personal_experts_by_name(mixture):
    method, state, side, folder = mixture
    bundle = load_bundle(folder)
    for name in ("experts", "correlation", "dispatched", "personal_round", "share"):
        a, b = getattr(state, name), getattr(bundle.state, name)
        assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes()), name
    assert bundle.method.federation.names == method.federation.names
    np.testing.assert_array_equal(
        bundle.method.federation.label_counts, method.federation.label_counts
    )
    assert sorted(p.stem for p in (folder / "personal").iterdir()) == [str(k) for k in range(6)]
    exported = PersonalStore(folder / "personal", layout_of(method))
    for k in range(6):
        np.testing.assert_array_equal(exported.load(k, 2), side.personal.load(k, 2))


def test_clients_that_never_trained_have_no_personal_expert(make_method, engine, train, tmp_path):
    method = make_method(train={"cohort": 0.5})
    cohort = method.cohort(method.init())
    export(method, engine, lambda e, m, _: train(e, m, 1), tmp_path)
    found = sorted(int(p.stem) for p in (tmp_path / "models" / "personal").iterdir())
    assert found == cohort


def test_one_expert_can_be_loaded_alone(mixture):
    method, state, side, folder = mixture
    for m in range(2):
        (folder / "experts" / f"expert-{1 - m}.safetensors").rename(folder / "away")
        bundle = load_bundle(folder, "fp32", only=m)
        scores = bundle.score(side.data.dataset.x_test)
        expected, _ = side.trainer.outputs(state.experts[m], side.data.dataset.x_test, 64)
        np.testing.assert_array_equal(scores.experts, expected[None])
        assert scores.gate is None
        (folder / "away").rename(folder / "experts" / f"expert-{1 - m}.safetensors")
    assert method.experts == 2


def test_exporting_again_gives_the_same_bytes_and_replaces_the_folder(mixture):
    method, state, side, folder = mixture

    def content():
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    before = content()
    (folder / "experts" / "expert-9.safetensors").write_bytes(b"left over")
    export_models(folder, method, state, side.personal)
    assert content() == before
    assert sorted(p.name for p in folder.parent.iterdir() if p.name.startswith(".")) == []


def test_nothing_that_is_hashed_holds_a_path_or_the_runtime(mixture):
    folder = mixture[3]
    text = (folder / "state.json").read_text()
    assert str(folder.parent) not in text
    assert "runtime" not in json.loads(text)["settings"]


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((2, 9, 8, 1), np.uint8),
        np.zeros((2, 8, 8, 1), np.float32),
        np.zeros((0, 8, 8, 1), np.uint8),
        np.zeros((8, 8), np.uint8),
    ],
)
def test_other_images_are_refused_with_what_the_model_takes(mixture, images):
    bundle = load_bundle(mixture[3])
    with pytest.raises(FedCoEError, match=r"takes uint8 \[n, 8, 8, 1\]"):
        bundle.predict(images)


def test_gray_images_may_come_without_a_channel_axis(mixture):
    images = np.array(mixture[2].data.dataset.x_test)
    bundle = load_bundle(mixture[3])
    assert bundle.predict(images[..., 0]).tobytes() == bundle.predict(images).tobytes()


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


DAMAGE = {
    "no folder": lambda f: f.rename(f.with_name("gone")),
    "no state": lambda f: (f / "state.json").unlink(),
    "no expert": lambda f: (f / "experts" / "expert-1.safetensors").unlink(),
    "cut state": lambda f: (f / "state.json").write_text((f / "state.json").read_text()[:200]),
    "binary state": lambda f: (f / "state.json").write_bytes(b"\xff\xfe\x00"),
    "a list": lambda f: (f / "state.json").write_text("[]"),
    "cut expert": lambda f: (f / "experts" / "expert-0.safetensors").write_bytes(b"\x10" * 30),
    "cut gate": lambda f: (f / "gate.safetensors").write_bytes(b"\x10" * 30),
    "other format": lambda f: edit(f / "state.json", lambda v: v.update(format=99)),
    "no key": lambda f: edit(f / "state.json", lambda v: v.pop("mean")),
    "unknown setting": lambda f: edit(f / "state.json", lambda v: v["settings"].update(x=1)),
    "unknown method": lambda f: edit(
        f / "state.json", lambda v: v["settings"]["method"].update(name="os")
    ),
    "more classes": lambda f: edit(f / "state.json", lambda v: v["classes"].append("z")),
    "more experts": lambda f: edit(
        f / "state.json", lambda v: v["settings"]["method"].update(experts=3)
    ),
    "words": lambda f: edit(f / "state.json", lambda v: v.update(share=["a"])),
    "shape": lambda f: edit(f / "state.json", lambda v: v.update(shape=[8, 8])),
    "fewer correlations": lambda f: edit(f / "state.json", lambda v: v["correlation"].pop()),
    "fewer shares": lambda f: edit(f / "state.json", lambda v: v["share"].pop()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_export_is_refused_in_one_line_that_names_it(mixture, damage):
    _, _, side, folder = mixture
    damage(folder)
    with pytest.raises(FedCoEError) as caught:
        load_bundle(folder).predict(np.array(side.data.dataset.x_test))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
