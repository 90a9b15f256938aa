"""Full-size recipes on tiny folders: each trains, is killed, goes on, and ends as if it had not been."""

import json
import multiprocessing
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import recipe_worker
import torch
from click.testing import CliRunner

from normscope.cli import main
from normscope.errors import ArgumentError, DataError
from normscope.lab.recipes import catalogue, engine
from normscope.lab.recipes.items import Boxes, Crops, Restored, noisy
from normscope.lab.recipes.job import Draw, Schedule
from normscope.lab.recipes.networks import INCEPTION, BNInception, Detector, DnCNN, ResNet50

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

# Recipe → an arm, and a size that takes a second: steps, items per process, pixels.
TINY = {
    "bn-inception": ("baseline", 4, 2, 32),
    "resnet50": ("Online-2", 4, 2, 64),
    "detector": ("Sync-2", 4, 2, 64),
    "dncnn": ("BN", 4, 2, 16),
    "edsr": ("none", 4, 2, 16),
    "pixel-mnist": ("BN-permuted", 4, 4, 6),
}
# A checkpoint is written after every second step: what is killed in the last one has gone on since the first.
HOLD = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures in classes, which serve as pictures without classes too, and boxes around parts of them."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        said = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "a"}, {"id": 9, "name": "b"}]}
        (root / part / "images").mkdir(parents=True)
        for k, label in enumerate("ab"):
            (root / part / label).mkdir()
            for n in range(count):
                pixels = rng.integers(0, 200, (40, 48, 3), dtype=np.uint8)
                pixels[..., k] += 50
                image = Image.fromarray(pixels)
                image.save(root / part / label / f"{n}.png")
                image.save(root / part / "images" / f"{label}{n}.png")
                key = len(said["images"])
                said["images"].append({"id": key, "file_name": f"{label}{n}.png", "width": 48, "height": 40})
                box = [int(v) for v in rng.integers(1, 20, 4)]
                said["annotations"].append({"image_id": key, "category_id": 7 + 2 * k, "bbox": box})
        (root / part / "annotations.json").write_text(json.dumps(said))
    return root


def classified(folder, tmp_path):
    """The same without the folder of pictures for boxes, which would be a third class."""
    for part in ("train", "val"):
        (tmp_path / part).mkdir(parents=True, exist_ok=True)
        for label in "ab":
            if not (tmp_path / part / label).exists():
                (tmp_path / part / label).symlink_to(folder / part / label)
    return tmp_path


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    plain = classified(folder, tmp_path_factory.mktemp("classes"))
    return lambda name: folder if name == "detector" else plain


def words(name, data, out, **changes):
    arm, steps, batch, edge = TINY[name]
    options = {"steps": steps, "batch": batch, "edge": edge, "every": 2, "report": 2} | changes
    listed = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return ["lab", "recipe", name, "--arm", arm, "--data", str(data(name)), "--out", str(out), *listed]


def call(*arguments, code=0):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def start():
    """A function that runs words in a process; it is forked from one that has imported everything, once."""
    processes = multiprocessing.get_context("forkserver")
    # torch._dynamo is what the first step of an optimizer imports.
    processes.set_forkserver_preload(["normscope.cli", "normscope.lab.recipes.catalogue", "torch._dynamo"])

    def go(words, told, hold=None, **environment):
        process = processes.Process(target=recipe_worker.run, args=(words, environment, told, hold), daemon=True)
        process.start()
        return process

    return go


def two(start, words, told, hold=None):
    """Two processes as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(words, told.with_suffix(f".{k}"), hold, RANK=str(k), LOCAL_RANK=str(k), **group) for k in range(2)
    ]  # fmt: skip


def finish(processes, told):
    for process in processes:
        process.join(120)
        said = [path.read_text() for path in told.parent.glob(f"{told.stem}.*")]
        assert process.exitcode == 0, said


def kill_after_the_first_checkpoint(out, processes, told):
    end = time.monotonic() + 120
    while not (out / engine.CHECKPOINT).exists():
        assert time.monotonic() < end
        said = [path.read_text() for path in told.parent.glob(f"{told.stem}.*")]
        assert all(process.exitcode is None for process in processes), said
        time.sleep(0.002)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
        assert process.exitcode == -signal.SIGKILL


def same(first, second):
    assert (first / engine.RESULT).read_bytes() == (second / engine.RESULT).read_bytes()
    kept = [torch.load(out / engine.CHECKPOINT, weights_only=True) for out in (first, second)]
    assert kept[0]["step"] == kept[1]["step"]
    assert kept[0]["network"].keys() == kept[1]["network"].keys()
    for key, value in kept[0]["network"].items():
        torch.testing.assert_close(value, kept[1]["network"][key], rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", TINY)
def test_killed_and_resumed_it_ends_with_the_same_numbers(name, data, tmp_path, start, one_thread):
    whole, broken, told = tmp_path / "whole", tmp_path / "broken", tmp_path / "told.txt"
    with recipe_worker.narrow():
        call(*words(name, data, whole))
        kill_after_the_first_checkpoint(broken, [start(words(name, data, broken), told, HOLD)], told)
        assert torch.load(broken / engine.CHECKPOINT, weights_only=True)["step"] < HOLD
        assert not (broken / engine.RESULT).exists()
        call(*words(name, data, broken))
    same(whole, broken)
    history = json.loads((whole / engine.RESULT).read_text())["history"]
    assert [entry["step"] for entry in history] == [2, 4]
    assert history[0] != history[1]


def test_every_recipe_is_tried():
    assert set(TINY) == set(catalogue.RECIPES)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("name", TINY)
def test_two_ranks_killed_and_resumed(name, data, tmp_path, start):
    whole, broken, told = tmp_path / "whole", tmp_path / "broken", tmp_path / "told.txt"
    finish(two(start, words(name, data, whole), told), told)
    kill_after_the_first_checkpoint(broken, two(start, words(name, data, broken), told, HOLD), told)
    finish(two(start, words(name, data, broken), told), told)
    same(whole, broken)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_one_process_does_not_go_on_for_two(data, tmp_path, start):
    out, told = tmp_path / "out", tmp_path / "told.txt"
    finish(two(start, words("dncnn", data, out), told), told)
    assert "another recipe" in call(*words("dncnn", data, out), code=2)


def test_sigterm_ends_after_the_step(data, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "normscope", *words("dncnn", data, out, steps=100_000, every=1)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not (out / engine.CHECKPOINT).exists():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.terminate()
    told = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 143, told
    assert "goes on" in told


def test_a_checkpoint_of_something_else_is_refused(data, tmp_path):
    out = tmp_path / "out"
    call(*words("dncnn", data, out))
    for changes in ({"seed": 1}, {"batch": 3}, {"steps": 7}, {"edge": 12}):
        assert "another recipe" in call(*words("dncnn", data, out, **changes), code=2)
    before = (out / engine.RESULT).read_bytes()
    call(*words("dncnn", data, out))  # finished: nothing happens
    assert (out / engine.RESULT).read_bytes() == before
    (out / engine.CHECKPOINT).write_bytes(b"half a file")
    assert "damaged" in call(*words("dncnn", data, out), code=2)


def test_another_seed_is_another_run(data, tmp_path):
    for seed in (0, 1):
        call(*words("dncnn", data, tmp_path / str(seed), seed=seed))
    assert (tmp_path / "0" / engine.RESULT).read_bytes() != (tmp_path / "1" / engine.RESULT).read_bytes()


def test_mixed_precision_trains_and_differs(data, tmp_path, one_thread):
    call(*words("dncnn", data, tmp_path / "full"))
    call(*words("dncnn", data, tmp_path / "half"), "--half")
    found = [json.loads((tmp_path / k / engine.RESULT).read_text())["history"][-1]["psnr"] for k in ("full", "half")]
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], abs=1.0)  # dB; bfloat16 keeps 8 bits


def test_a_detector_starts_from_a_classifier(data, tmp_path, monkeypatch):
    kept = tmp_path / "resnet"
    call("lab", "recipe", "resnet50", "--arm", "GN-2", "--data", data("resnet50"), "--out", kept, "--steps", 1,
         "--edge", 32)  # fmt: skip
    network = Detector(2, norm="groups32")
    engine._start(network, kept / engine.CHECKPOINT)
    theirs = torch.load(kept / engine.CHECKPOINT, weights_only=True)["network"]
    for key, value in network.features.state_dict().items():
        torch.testing.assert_close(value, theirs[f"features.{key}"], rtol=0, atol=0)
    with pytest.raises(DataError, match="features"):
        engine._start(Detector(2, norm="BN"), kept / engine.CHECKPOINT)


def test_an_ensemble_votes(data, tmp_path):
    outs = [tmp_path / str(seed) for seed in (0, 1)]
    for seed, out in enumerate(outs):
        call(*words("pixel-mnist", data, out, seed=seed))
    job = catalogue.resized(catalogue.find("pixel-mnist", "BN-permuted"), steps=4, batch=4, edge=6)
    alone = engine.together(job, [outs[0] / engine.CHECKPOINT], data("pixel-mnist"))
    entry = json.loads((outs[0] / engine.RESULT).read_text())["history"][-1]
    assert alone == {name: entry[name] for name in alone}
    votes = [part for out in outs for part in ("--ensemble", out)]
    told = json.loads(call(*words("pixel-mnist", data, tmp_path / "x"), *votes))
    assert set(told) == {"top-1", "top-5"}


def test_wrong_words_are_told(data, tmp_path):
    assert "bn-inception" in call("lab", "recipe")
    assert "frozen-2" in call("lab", "recipe", "detector")
    assert "no recipe" in call("lab", "recipe", "resnet51", "--arm", "x", code=2)
    assert "no arm" in call("lab", "recipe", "resnet50", "--arm", "BN-3", code=2)
    assert "--data is needed" in call("lab", "recipe", "resnet50", "--arm", "BN-2", code=2)
    (tmp_path / "train").mkdir()
    assert "no folders of classes" in call(
        "lab", "recipe", "resnet50", "--arm", "BN-2", "--data", tmp_path, "--out", tmp_path / "o", code=2
    )
    assert "fewer than one batch" in call(*words("dncnn", data, tmp_path / "o", batch=100), code=2)
    with pytest.raises(ArgumentError, match="every"):
        engine.Settings(tmp_path, every=0)


# --- the networks, against what is published --------------------------------------------------------------------------


def test_inception_has_the_sizes_of_figure_5():
    with torch.device("meta"):
        network = BNInception(1000)
        x, seen = torch.empty(1, 3, 224, 224), []
        for layer in network.features:
            x = layer(x)
            seen.append(tuple(x.shape[1:]))
    assert seen[1:6] == [(64, 112, 112), (64, 56, 56), (64, 56, 56), (192, 56, 56), (192, 28, 28)]
    maps = dict(zip([row[0] for row in INCEPTION], seen[6:], strict=True))
    assert maps == {
        "3a": (256, 28, 28), "3b": (320, 28, 28), "3c": (576, 14, 14), "4a": (576, 14, 14), "4b": (576, 14, 14),
        "4c": (576, 14, 14), "4d": (576, 14, 14), "4e": (1024, 7, 7), "5a": (1024, 7, 7), "5b": (1024, 7, 7),
    }  # fmt: skip


def test_inception_has_the_weights_of_the_code_that_its_authors_published():
    with torch.device("meta"):
        features = BNInception(1000).features
    convolutions = [layer for layer in features.modules() if isinstance(layer, torch.nn.Conv2d)]
    norms = [layer for layer in features.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    # inception_v2_test.py of tensorflow/models counts β and both running statistics, there is no γ; its first
    # convolution, a separable one, has 64 biases in place of a normalizer.
    state = 3 * (sum(norm.num_features for norm in norms) - 64) + 64
    assert sum(layer.weight.numel() for layer in convolutions) + state == 10_173_112


def test_networks_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        count = [sum(p.numel() for p in n.parameters()) for n in (ResNet50(1000, norm="BN"), DnCNN("BN"))]
    # torchvision's resnet50; Zhang et al. 2017 say 0.56 million of DnCNN-S.
    assert count[0] == 25_557_032
    assert count[1] == pytest.approx(0.56e6, rel=0.01)


# --- order, pictures, boxes -------------------------------------------------------------------------------------------


def test_processes_share_every_epoch_and_a_later_start_goes_on():
    ranks = [engine._Order(20, 3, 0, 0, rank, 2) for rank in range(2)]
    seen = [[next(it) for _ in range(6)] for it in map(iter, ranks)]
    for epoch in range(2):
        drawn = [d.index for rank in seen for batch in rank[3 * epoch : 3 * epoch + 3] for d in batch]
        assert len(set(drawn)) == 18
    assert {d.seed for d in seen[0][0]}.isdisjoint(d.seed for batch in seen[0][3:] for d in batch)
    late = iter(engine._Order(20, 3, 0, 4, 1, 2))
    assert [next(late) for _ in range(2)] == seen[1][4:]


def test_a_draw_decides_what_is_random(data):
    items = Crops(data("resnet50") / "train", 16, training=True, light=True)
    first, again, other = (items[Draw(3, seed)][0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    plain = Crops(data("resnet50") / "train", 16, training=False)
    assert torch.equal(plain[Draw(3, 5)][0], plain[Draw(3, 6)][0])
    assert plain.classes == 2
    patches = Restored(data("dncnn") / "train", 16, training=True, damage=noisy)
    damaged, clean = patches[Draw(0, 1)]
    # 256 values: the standard deviation is known to 4.4 %, four of that.
    assert float((damaged - clean).std()) == pytest.approx(25 / 255, rel=0.18)
    with pytest.raises(DataError, match="smaller than a patch"):
        Restored(data("dncnn") / "train", 41, training=True, damage=noisy)[Draw(0, 1)]


def test_cells_hold_the_boxes(folder):
    items = Boxes(folder / "train", 128, training=False)
    said = json.loads((folder / "train" / "annotations.json").read_text())
    x, y = items[Draw(8, 0)]
    assert (tuple(x.shape), tuple(y.shape)) == ((3, 128, 128), (5, 4, 4))
    left, top, w, h = (v / n for v, n in zip(said["annotations"][8]["bbox"], (48, 40, 48, 40), strict=True))
    rows, columns = (y[0] > 0).nonzero(as_tuple=True)
    assert (y[0][rows, columns] == 2).all()
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        cx, cy = (column + 0.5) / 4, (row + 0.5) / 4
        expected = [max(0, v) for v in (cx - left, cy - top, left + w - cx, top + h - cy)]
        assert y[1:, row, column].tolist() == pytest.approx(expected, abs=1e-6)
    # Mirrored, the distances to left and right change places.
    mirrored = Boxes(folder / "train", 128, training=True)
    turned = next(mirrored[Draw(8, s)] for s in range(20) if not torch.equal(mirrored[Draw(8, s)][0], x))
    torch.testing.assert_close(turned[0], x.flip(2))
    torch.testing.assert_close(turned[1], torch.stack([y.flip(2)[k] for k in (0, 3, 2, 1, 4)]))


def test_boxes_that_agree_overlap_wholly():
    y = torch.rand(2, 5, 3, 3) + 0.1
    y[:, 0] = 1
    output = torch.zeros(2, 7, 3, 3)
    output[:, -4:] = y[:, 1:].log()
    torch.testing.assert_close(catalogue._overlap(output, y), torch.ones(2, 3, 3))
    output[:, -4:] += torch.log(torch.tensor(0.5))  # half as wide and half as high
    torch.testing.assert_close(catalogue._overlap(output, y), torch.full((2, 3, 3), 0.25))


def test_rates():
    steps = Schedule(100, 1, 1.0, falls=(0.5, 0.75), factor=0.1)
    assert [steps.rate_at(k) for k in (0, 49, 50, 75)] == pytest.approx([1, 1, 0.1, 0.01])
    smooth = Schedule(100, 1, 1.0, factor=0.25)
    assert [smooth.rate_at(k) for k in (0, 50, 100)] == pytest.approx([1, 0.5, 0.25])
