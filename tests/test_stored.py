"""Laws of images that are kept as bytes or streamed: they are the images of float32 storage, whoever reads them."""

import os
import signal
import subprocess
import sys

import jaxtyping
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from stand_ins import write_imagenet
from test_unusual import execute

from ntklib import chapters, models, plots
from ntklib.data import NAMES, STORAGES, ByteImages, Dataset, StreamedImages, load, probe_set
from ntklib.data.crops import crop_boxes, crop_draws, resized_crop_flip
from ntklib.data.folders import FolderError, ImageFiles
from ntklib.data.stored import sample, statistics, worker_count
from ntklib.random import stream
from ntklib.training import BatchOrder, accuracy, sgd
from ntklib.training.batches import batches


def pixels(n: int = 11, shape: tuple[int, ...] = (3, 8, 8), seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (n, *shape), generator=stream(seed, "pixels"), dtype=torch.uint8)


def kept(kind: type, n: int = 11, shape: tuple[int, ...] = (3, 8, 8)) -> Dataset:
    """Random images, as bytes, streamed, or (``torch.Tensor``) as the float32 tensor that these stand for."""
    mean, std = statistics(pixels(n, shape))
    y = torch.arange(n) % 3
    parts = [pixels(n, shape, seed) for seed in (0, 1)]
    if kind is torch.Tensor:
        x_train, x_test = ((part.to(torch.float32) - mean) / std for part in parts)
    else:
        x_train, x_test = (kind(part, mean, std) for part in parts)
    return Dataset("random", x_train, y, x_test, y, 3)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("NTKLIB_DATA", str(tmp_path))
    return tmp_path


def children() -> set[int]:
    """Processes of this one that are at work."""
    return {p.pid for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE}


@pytest.fixture(autouse=True)
def no_workers(monkeypatch):
    monkeypatch.setenv("NTKLIB_WORKERS", "0")


INDICES = [
    slice(None),
    slice(2, 7, 2),
    slice(-3, None),
    torch.tensor([4, 0, 4]),
    torch.arange(11) % 3 == 1,
    torch.tensor([], dtype=int),
]


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("kind", [ByteImages, StreamedImages])
def test_an_index_gives_the_bits_of_the_tensor_that_stored_images_stand_for(kind, index):
    expected, stored = kept(torch.Tensor).x_train, kept(kind).x_train
    assert torch.equal(stored[index], expected[index])
    assert (len(stored), stored.shape, stored.ndim, stored.dtype, stored.device) == (
        11, expected.shape, 4, expected.dtype, expected.device,
    )  # fmt: skip
    assert torch.equal(torch.cat(list(stored.split(4))), expected)
    assert torch.equal(stored.first(5)[:], expected[:5])


def test_bytes_take_a_matrix_of_indices_too():
    index = torch.tensor([[1, 2], [0, 10]])
    assert torch.equal(kept(ByteImages).x_train[index], kept(torch.Tensor).x_train[index])


@pytest.mark.parametrize("kind", [ByteImages, StreamedImages])
def test_stored_images_move_to_a_device(kind):
    moved = kept(kind).to("meta")
    assert (moved.x_train.device.type, moved.x_train[:2].device.type, moved.x_test.device.type) == ("meta",) * 3
    assert moved.x_train[:2].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("n", [1, 7, 5000])
def test_statistics_are_those_of_the_bytes(n):
    x = pixels(n, (3, 4, 4))
    mean, std = statistics(x)
    assert (mean.shape, std.shape, mean.dtype) == ((3, 1, 1), (3, 1, 1), torch.float32)
    for k in range(3):
        values = [int(v) for v in x[:, k].reshape(-1)]
        m = sum(values) / len(values)
        assert float(mean[k]) == pytest.approx(m, rel=1e-7)  # rounded to float32 once
        variance = sum((v - m) ** 2 for v in values) / (len(values) - 1)
        assert float(std[k]) == pytest.approx(variance**0.5, rel=1e-7)


@pytest.mark.parametrize("storage", STORAGES[1:])
@pytest.mark.parametrize("name", ["digits", "mnist5k", "imagenet"])
def test_every_storage_holds_the_same_images_and_labels(name, storage, root):
    write_imagenet(root)
    some = {} if name == "imagenet" else {"num_train": 60, "num_test": 20}
    plain, stored = load(name, **some), load(name, **some, storage=storage)
    for part in ("x_train", "x_test"):
        got, expected = getattr(stored, part)[:], getattr(plain, part)
        torch.testing.assert_close(
            got, expected, rtol=0, atol=2e-5
        )  # float32 sums of up to 1e6 pixels, in units of their deviation
    assert torch.equal(stored.y_train, plain.y_train)
    assert torch.equal(stored.y_test, plain.y_test)
    assert (stored.input_shape, stored.num_classes) == (plain.input_shape, plain.num_classes)


def test_whole_bytes_are_a_copy_and_small_numbers_are_exact():
    first = load("mnist5k", storage="uint8")
    before = first.x_train.pixels.clone()
    first.x_train.pixels.zero_()
    assert torch.equal(load("mnist5k", storage="uint8").x_train.pixels, before)
    levels = load("digits", storage="uint8").x_train.pixels
    assert (int(levels.max()), levels.dtype) == (16, torch.uint8)


def end(data: Dataset, **options) -> dict[str, torch.Tensor]:
    net = models.build("resnet18", input_shape=data.input_shape, num_classes=3, width=2)
    chosen = {"lr": 0.1, "momentum": 0.9, "batch_size": 4, "epochs": 2, "seed": 1} | options
    *_, last = sgd(net, data, **chosen)
    return {k: v.clone() for k, v in last.tensors().items()} | {"loss": torch.tensor(last.loss)}


@pytest.mark.parametrize("augment", ["none", "crop_flip", "resized_crop_flip"])
@pytest.mark.parametrize(("kind", "workers"), [(ByteImages, 0), (StreamedImages, 0), (StreamedImages, 1), (StreamedImages, 2)])
def test_training_takes_the_same_steps_whatever_the_storage_and_the_workers(kind, workers, augment, monkeypatch):
    monkeypatch.setenv("NTKLIB_WORKERS", str(workers))
    expected, got = end(kept(torch.Tensor), augment=augment), end(kept(kind), augment=augment)
    assert all(torch.equal(got[k], v) for k, v in expected.items())


@pytest.mark.parametrize("workers", [0, 2])
def test_measures_see_the_same_images_whatever_the_storage(workers, monkeypatch):
    monkeypatch.setenv("NTKLIB_WORKERS", str(workers))
    net = models.build("resnet18", input_shape=(3, 8, 8), num_classes=3, width=2)
    plain = kept(torch.Tensor)
    for kind in (ByteImages, StreamedImages):
        data = kept(kind)
        assert torch.equal(probe_set(data.x_train, data.y_train, 6)[0], probe_set(plain.x_train, plain.y_train, 6)[0])
        calibrated, expected = (models.recalibrated(net, d.x_train, 4) for d in (data, plain))
        assert all(torch.equal(a, b) for a, b in zip(calibrated.buffers(), expected.buffers(), strict=True))
        assert accuracy(expected, data.x_test, data.y_test, 4) == accuracy(expected, plain.x_test, plain.y_test, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_run_resumed_from_any_measured_step_ends_with_the_same_bits(workers, monkeypatch):
    monkeypatch.setenv("NTKLIB_WORKERS", str(workers))
    data = kept(StreamedImages)

    def run(**resume):
        net = models.build("resnet18", input_shape=data.input_shape, num_classes=3, width=2, seed=len(resume))
        options = {"lr": 0.1, "batch_size": 4, "epochs": 2, "augment": "crop_flip", "measure_at": [0, 2, 3]}
        return [(s.step, {k: v.clone() for k, v in s.tensors().items()}) for s in sgd(net, data, **options, **resume)]

    whole = run()
    for k, (step, tensors) in enumerate(whole):
        rest = run(resume=(step, tensors))
        assert [s for s, _ in rest] == [s for s, _ in whole[k + 1 :]]
        assert all(torch.equal(a[key], b[key]) for (_, a), (_, b) in zip(rest, whole[k + 1 :], strict=True) for key in a)


def test_streaming_leaves_the_global_generator_alone(monkeypatch):
    monkeypatch.setenv("NTKLIB_WORKERS", "1")
    state = torch.get_rng_state()
    list(kept(StreamedImages).x_train.split(4))
    assert torch.equal(torch.get_rng_state(), state)


# Files


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_of_files_are_those_of_the_whole_image_whatever_the_workers(workers, root, monkeypatch):
    monkeypatch.setenv("NTKLIB_WORKERS", str(workers))
    write_imagenet(root)
    data, order = load("imagenet", storage="stream"), BatchOrder(9, 4, seed=5)
    for step, (x, y) in zip(range(4), batches(data, order, resized_crop_flip, range(4)), strict=True):
        index = order.indices(step)
        assert torch.equal(y, data.y_train[index])
        draws = crop_draws(len(index), stream(5, "augment", step))
        expected = []
        for row, path in zip(draws, [data.x_train.source.paths[i] for i in index], strict=True):
            image = Image.open(path)
            box, flip = crop_boxes(row[None], image.height, image.width)
            top, left, h, w = box[0].tolist()
            cut = np.asarray(image.crop((left, top, left + w, top + h)).resize((224, 224), Image.Resampling.BILINEAR))
            expected.append(torch.from_numpy(cut[:, ::-1].copy() if flip else cut.copy()).permute(2, 0, 1))
        torch.testing.assert_close(x, data.x_train.standardised(torch.stack(expected)), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_a_chapter_trains_on_a_folder_of_images_that_are_streamed(root, tmp_path, monkeypatch):
    write_imagenet(root)
    monkeypatch.setenv("NTKLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("NTKLIB_WORKERS", "1")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.chdir(chapters.notebooks_folder())
    monkeypatch.setattr(plots.plt, "show", lambda: None)
    few = {"num_train": 0, "num_test": 0, "batch_size": 5, "epochs": 2, "num_probe": 2, "num_seeds": 1, "num_control_seeds": 1}
    values = {"dataset": "imagenet", "storage": "stream", "augment": "resized_crop_flip", "width": 1, "other_datasets": []} | few
    (result,) = execute("trace_evolution", values)["results"]
    assert (result.status, set(result.history["step"])) == ("complete", {0, 2, 4})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_damaged_file_is_named_whoever_decodes_it(part, workers, root, monkeypatch):
    monkeypatch.setenv("NTKLIB_WORKERS", str(workers))
    write_imagenet(root)
    data = load("imagenet", storage="stream")
    path = root / "imagenet" / part / "n03" / "0.png"
    path.write_bytes(path.read_bytes()[:3000])
    images, before = (data.x_train if part == "train" else data.x_test), children()
    with pytest.raises(FolderError, match=f"^{path} is not an image that can be read: .*Replace the file or remove it"):
        list(images.split(3))
    assert children() <= before


def test_files_are_not_decoded_before_they_are_asked_for(root, monkeypatch):
    write_imagenet(root)
    monkeypatch.setattr("ntklib.data.stored.SAMPLE", 2)
    decoded = []
    original = ImageFiles.decode
    monkeypatch.setattr(
        ImageFiles, "decode", lambda self, index, *a, **k: decoded.append(len(index)) or original(self, index, *a, **k)
    )
    data = load("imagenet", storage="stream")
    assert decoded == [2]  # every fifth of nine, for mean and deviation
    assert len(sample(data.x_train)) == 2
    assert len(data.x_train[torch.tensor([3])]) == 1
    assert decoded == [2, 1]
    assert sample(kept(StreamedImages).x_train).shape[0] == 11  # arrays are in memory


def test_workers_end_with_a_run_that_is_left(monkeypatch):
    monkeypatch.setenv("NTKLIB_WORKERS", "2")
    net, before = models.build("mlp", input_shape=(3, 8, 8), num_classes=3, width=2), children()
    run = sgd(net, kept(StreamedImages), lr=0.1, batch_size=4, epochs=5, measure_at=[2])
    next(run)
    assert len(children() - before) == 2
    run.close()
    assert children() <= before


SCRIPT = """
import sys, time, torch
from ntklib import models
from ntklib.data import Dataset, StreamedImages
from ntklib.training import sgd
x = torch.zeros(64, 1, 4, 4, dtype=torch.uint8)
images = StreamedImages(x, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
y = torch.arange(64) % 2
net = models.build("mlp", input_shape=(1, 4, 4), num_classes=2, width=2)
for state in sgd(net, Dataset("zeros", images, y, images, y, 2), lr=0.1, batch_size=4, epochs=9, measure_at=[3]):
    print("at work", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed():
    environment = os.environ | {"NTKLIB_WORKERS": "2"}
    run = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, env=environment)
    try:
        assert run.stdout.readline() == b"at work\n"
        workers = psutil.Process(run.pid).children()
        assert len(workers) == 2
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
    gone, alive = psutil.wait_procs(workers, timeout=20)  # a worker looks for its parent every 5 seconds
    assert (len(gone), alive) == (2, [])


# Crops


def box_by_hand(draws: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    """The first attempt that fits, else the largest middle part; torchvision's ``RandomResizedCrop`` with given numbers."""
    for k in range(10):
        area, shape, down, right = draws[1 + 4 * k : 5 + 4 * k]
        target = height * width * (0.08 + 0.92 * area)
        ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * shape)
        w, h = round((target * ratio) ** 0.5), round((target / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(224, 224), (300, 500), (32, 32), (8, 400), (400, 8), (1, 1)])
def test_boxes_are_those_of_the_usual_definition(size):
    draws = crop_draws(300, stream(0, "augment"))
    boxes, flip = crop_boxes(draws, *size)
    assert boxes.tolist() == [list(box_by_hand([float(v) for v in row], *size)) for row in draws]
    assert flip.tolist() == [float(row[0]) < 0.5 for row in draws]
    top, left, h, w = boxes.unbind(1)
    assert bool(((top >= 0) & (left >= 0) & (top + h <= size[0]) & (left + w <= size[1]) & (h > 0) & (w > 0)).all())


def test_boxes_have_areas_shapes_and_places_all_over_their_ranges():
    boxes, flip = crop_boxes(crop_draws(4000, stream(1, "augment")), 1000, 1000)
    top, left, h, w = boxes.double().unbind(1)
    assert abs(float(flip.double().mean()) - 0.5) < 4 * 0.5 / 4000**0.5
    assert 0.079 < float((h * w).min()) / 1e6 < 0.09
    assert 0.9 < float((h * w).max()) / 1e6 <= 1
    assert 0.74 < float((w / h).min()) < 0.76
    assert 1.32 < float((w / h).max()) < 1.34
    assert abs(float((w / h).log().mean())) < 4 * 0.17 / 4000**0.5  # symmetric; deviation of a uniform logarithm 0.166
    room = 1000 - h > 100
    assert abs(float((top / (1000 - h))[room].mean()) - 0.5) < 4 * 0.29 / int(room.sum()) ** 0.5
    assert int(((left == 0) | (left + w == 1000)).sum()) > 0


def test_crops_in_memory_are_those_of_the_usual_library_to_a_grey_level():
    x = pixels(40, (3, 20, 20))
    got = resized_crop_flip(x.float(), stream(2, "augment"))
    boxes, flip = crop_boxes(crop_draws(40, stream(2, "augment")), 20, 20)
    for image, (top, left, h, w), mirrored, ours in zip(x, boxes.tolist(), flip.tolist(), got, strict=True):
        cut = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + w, top + h))
        theirs = np.asarray(cut.resize((20, 20), Image.Resampling.BILINEAR)).astype(float)
        theirs = theirs[:, ::-1] if mirrored else theirs
        assert abs(ours.permute(1, 2, 0).numpy() - theirs).max() <= 1.01  # whole levels, rounded in each direction


def test_a_crop_of_a_constant_image_is_constant():
    x = torch.full((50, 1, 9, 13), 3.25)
    torch.testing.assert_close(resized_crop_flip(x, stream(0, "augment")), x, rtol=1e-6, atol=0)  # weights add up to 1


# Errors


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_storage_is_refused_first(name):
    with pytest.raises(ValueError, match=r"Unknown storage 'unit8'\. Did you mean 'uint8'\? Known: float32, stream, uint8\."):
        load(name, storage="unit8")


@pytest.mark.parametrize("value", ["two", "-1", "1.5"])
def test_a_wrong_number_of_workers_is_refused(value, monkeypatch):
    monkeypatch.setenv("NTKLIB_WORKERS", value)
    with pytest.raises(ValueError, match=f"^NTKLIB_WORKERS must be a whole number of processes, 0 for none. Got {value!r}"):
        worker_count()


def test_workers_are_counted_by_cores_unless_told(monkeypatch):
    monkeypatch.setenv("NTKLIB_WORKERS", "3")
    assert worker_count() == 3
    monkeypatch.delenv("NTKLIB_WORKERS")
    for cores, workers in ((1, 0), (4, 3), (64, 16)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert worker_count() == workers


@pytest.mark.parametrize("kind", [ByteImages, StreamedImages])
def test_stored_images_have_no_unit_range(kind):
    with pytest.raises(ValueError, match=f"must be stored as float32. Got {kind.__name__}. Load them with storage='float32'"):
        kept(kind).in_unit_range()
    assert float(kept(torch.Tensor).in_unit_range().x_train.min()) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [ByteImages, StreamedImages])
def test_a_gpu_gets_the_bits_of_the_cpu(kind, monkeypatch):
    monkeypatch.setenv("NTKLIB_WORKERS", "2")
    here, there = kept(kind), kept(kind).to("cuda")
    for a, b in zip(here.x_train.split(4), there.x_train.split(4), strict=True):
        assert b.is_cuda
        assert torch.equal(a, b.cpu())
    assert torch.equal(here.x_train[2:5], there.x_train[2:5].cpu())
