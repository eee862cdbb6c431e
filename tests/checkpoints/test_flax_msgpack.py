"""Flax's files, compared with flax itself: trees of every kind, single arrays, and files cut at every place."""

import flax.serialization
import hypothesis
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as arrays_of

from alignment_gap.checkpoints.flax_msgpack import is_flax_file, read_tree
from alignment_gap.checkpoints.tensors import Tensor
from alignment_gap.errors import UserError

DTYPES = ("float32", "float64", "float16", "int8", "uint8", "int32", "int64", "uint16", "bool", "bfloat16")


@strategies.composite
def arrays(draw):
    dtype = draw(strategies.sampled_from(DTYPES))
    shape = draw(arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    return np.arange(int(np.prod(shape))).reshape(shape).astype(jnp.dtype(dtype))


LEAVES = arrays() | strategies.integers(-(2**40), 2**40) | strategies.booleans() | strategies.text(max_size=40)
KEYS = strategies.text(min_size=1, max_size=6)
TREES = strategies.recursive(
    strategies.dictionaries(KEYS, LEAVES, max_size=4),
    lambda inner: strategies.dictionaries(KEYS, LEAVES | inner, min_size=1, max_size=4),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("flax") / "file"


def assert_equal_trees(found, wanted):
    if isinstance(wanted, dict):
        assert isinstance(found, dict) and found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_equal_trees(found[key], value)
    elif isinstance(wanted, np.ndarray | np.generic):
        assert isinstance(found, Tensor) and not found.stacked
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype.name)
        np.testing.assert_array_equal(found.read(None), wanted, strict=isinstance(wanted, np.ndarray))
        for layer in range(len(wanted)) if wanted.ndim > 1 else ():
            np.testing.assert_array_equal(found.read(layer), wanted[layer])
    else:
        assert found == wanted and type(found) is type(wanted)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(tree=TREES)
def test_a_tree_is_what_flax_restores(path, tree):
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    assert_equal_trees(read_tree(path), flax.serialization.msgpack_restore(path.read_bytes()))
    assert is_flax_file(path) == bool(tree)


@pytest.mark.parametrize("size", [0, 1, 2, 5, 8, 15, 16, 200, 300, 70_000])
def test_arrays_of_every_length_of_header(path, size):
    """Fixed extensions, and extensions whose length takes one, two or four bytes."""
    tree = {"before": 1, "a": np.arange(size, dtype=np.uint8), "after": "x" * 40}
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    assert_equal_trees(read_tree(path), tree)


@pytest.mark.parametrize("header", [b"\x82", b"\xde\x00\x02", b"\xdf\x00\x00\x00\x02"])
def test_dictionaries_of_every_length_of_header(path, header):
    """Headers of four bits, two bytes and four bytes."""
    path.write_bytes(header + b"".join(map(msgpack.packb, ("a", 1, "b", {"c": 2}))))
    assert read_tree(path) == {"a": 1, "b": {"c": 2}}
    assert is_flax_file(path)


def test_numbers_of_numpy_are_tensors_of_one_value(path):
    tree = {"step": np.int32(7), "rate": np.float32(0.5)}
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    found = read_tree(path)
    assert {name: (t.shape, t.dtype, t.read(None).item()) for name, t in found.items()} == {
        "step": ((), "int32", 7),
        "rate": ((), "float32", 0.5),
    }


def test_pieces_of_a_large_array_are_read_by_layer_too(path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 32)
    array = np.arange(30, dtype=np.int16).reshape(3, 5, 2)
    path.write_bytes(flax.serialization.msgpack_serialize({"a": array}))
    tensor = read_tree(path)["a"]
    assert (tensor.shape, tensor.dtype) == ((3, 5, 2), "int16")
    for layer in range(3):
        np.testing.assert_array_equal(tensor.read(layer), array[layer])


def test_a_file_that_is_cut_anywhere_is_refused_in_one_line(path):
    tree = {"optimizer": {"target": {"w": np.arange(6.0), "b": np.float32(1)}, "names": ["x", "y"]}, "version": 3}
    content = flax.serialization.msgpack_serialize(tree)
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=f"^{path} is (damaged|cut short|no file)") as error:
            read_tree(path)
        assert "\n" not in str(error.value)


def test_the_array_that_is_cut_is_named_with_its_bytes(path):
    content = flax.serialization.msgpack_serialize({"a": {"b": np.zeros(100, np.uint8)}})
    path.write_bytes(content[:-30])
    size = len(content) - content.index(b"\xc7") - 3
    with pytest.raises(UserError, match=rf"cut short: a.b has {size - 30} of its {size} bytes, and everything"):
        read_tree(path)


def extension(kind, *parts):
    return msgpack.packb({"a": msgpack.ExtType(kind, b"".join(map(msgpack.packb, parts)))})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (extension(2, [1.0, 2.0]), "a is of flax's extension type 2, which is no array"),
        (extension(1, [1, 2]), "is damaged: a is no array of flax"),
        (extension(1, [[4], "float32", b"1234"]), r"is damaged: a has \d+ bytes, its shape \(4,\) takes more"),
        (extension(1, [[4], "float33", b"1234"]), "is damaged or no file of flax"),
        (msgpack.packb([1, 2]), "is no file of flax: it holds no dictionary"),
        (msgpack.packb(3), "is no file of flax: it holds no dictionary"),
        (b"", "is damaged or no file of flax .*cut short"),
    ],
)
def test_what_is_no_tree_of_arrays_is_said_to_be_none(path, content, message):
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_tree(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere cannot be read \(.*No such file.*\): check the path"):
        read_tree(tmp_path / "nowhere")
    assert not is_flax_file(tmp_path / "nowhere") and not is_flax_file(tmp_path)


@pytest.mark.parametrize(
    ("content", "is_one"),
    [
        (msgpack.packb({"optimizer": 1}), True),
        (b"\xde\x00\x01" + msgpack.packb("a"), True),
        (b"\xdf\x00\x00\x00\x01" + msgpack.packb("a"), True),
        (msgpack.packb({}), False),
        (msgpack.packb({1: 2}), False),
        (msgpack.packb(["a"]), False),
        (b"\xde\x00", False),
        (b"\x81", False),
        (b"{}", False),
        (b"", False),
    ],
)
def test_flaxs_files_are_told_by_their_first_bytes(path, content, is_one):
    path.write_bytes(content)
    assert is_flax_file(path) == is_one
