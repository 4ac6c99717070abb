"""MNIST from files on disk: what they hold is what is trained on, and what is wrong with them is said."""

import gzip

import numpy as np
import pytest
import torch

import dhf
from dhf.problems import build_problem
from dhf.problems.mnist import read_images
from tests.problems.idx import encoded, write_images

TRAINING, HELD_OUT = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


def drawn(number: int, seed: int = 0) -> np.ndarray:
    images = np.random.default_rng(seed).integers(0, 256, (number, 28, 28))
    images[0, 0, :2] = 0, 255
    return images


def build(folder):
    return build_problem("mnist-autoencoder", {"folder": str(folder)})


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_are_read_as_written(tmp_path, suffix):
    written = drawn(5)
    write_images(tmp_path / (TRAINING + suffix), written)
    images, targets = build(tmp_path).train
    assert images is targets
    assert (images.dtype, images.shape) == (torch.float32, (5, 784))
    assert np.array_equal(np.rint(images.numpy() * 255), written.reshape(5, 784))
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)


def test_the_network_is_the_one_described_and_held_out_images_are_optional(tmp_path):
    write_images(tmp_path / TRAINING, drawn(3))
    problem = build(tmp_path)
    layers = [m for m in problem.objective.module if isinstance(m, torch.nn.Linear)]
    assert [layers[0].in_features, *(m.out_features for m in layers)] == [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    assert problem.validation is None
    write_images(tmp_path / f"{HELD_OUT}.gz", drawn(2, seed=1))
    assert torch.equal(build(tmp_path).validation[0], read_images(tmp_path / f"{HELD_OUT}.gz"))


def test_missing_files_are_named(tmp_path):
    write_images(tmp_path / HELD_OUT, drawn(2))
    with pytest.raises(dhf.UsageError) as error:
        build(tmp_path)
    assert f"needs {TRAINING} or {TRAINING}.gz in {str(tmp_path)!r}, where neither is" in str(error.value)
    assert "--options.folder" in str(error.value)
    with pytest.raises(dhf.UsageError, match="which is not a folder"):
        build(tmp_path / "absent")


@pytest.mark.parametrize(
    ("suffix", "data", "text"),
    [
        ("", encoded(drawn(3), magic=0x801), "magic number 0x00000801, not 0x00000803"),
        ("", encoded(drawn(3))[:-1], "holds 3 images, 2352 bytes, and holds 2351"),
        ("", encoded(drawn(3)) + b"\0", "holds 3 images, 2352 bytes, and holds 2353"),
        ("", encoded(drawn(3))[:15], "15 bytes, less than the header"),
        ("", encoded(np.zeros((2, 8, 8))), "2 images of 8x8"),
        ("", encoded(np.zeros((0, 28, 28))), "0 images of 28x28"),
        (".gz", encoded(drawn(3)), "cannot be read: Not a gzipped file"),
        (".gz", gzip.compress(encoded(drawn(3)))[:-20], "cannot be read: Compressed file ended"),
        (".gz", b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + b"\xff" * 40, "cannot be read"),
    ],
)
def test_damaged_files_are_told(tmp_path, suffix, data, text):
    (tmp_path / (TRAINING + suffix)).write_bytes(data)
    with pytest.raises(dhf.UsageError) as error:
        build(tmp_path)
    assert text in str(error.value)
    assert TRAINING in str(error.value)
