"""Tensors that are loaded only on request, and their conversion between our names and those of another format."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies

from alignment_gap.checkpoints import Entry, Tensor, check_entries, check_shapes, exported, imported
from alignment_gap.checkpoints.tensors import from_array, parameter_count, shapes_of
from alignment_gap.errors import UserError


def reading(array, reads, *, stacked=False):
    """A tensor that records each read."""

    def read(layer):
        reads.append(layer)
        return array if layer is None else array[layer]

    return Tensor(array.shape, array.dtype.name, read, stacked)


def test_shapes_of_a_tree_by_dotted_names():
    tree = {"a": {"b": np.zeros((2, 3)), "c": jax.ShapeDtypeStruct((4,), np.float32)}, "d": np.float32(1)}
    assert shapes_of(tree) == {"a.b": (2, 3), "a.c": (4,), "d": ()}
    assert parameter_count({"x": from_array(np.zeros((2, 3))), "y": from_array(np.zeros(()))}) == 7


def test_an_array_is_read_whole_or_by_layer():
    array = np.arange(6, dtype=np.int16).reshape(3, 2)
    tensor = from_array(array, stacked=True)
    assert (tensor.shape, tensor.dtype, tensor.stacked) == ((3, 2), "int16", True)
    np.testing.assert_array_equal(tensor.read(None), array)
    np.testing.assert_array_equal(tensor.read(2), [4, 5])


SHAPES = {f"layer_{i}": (i, 2) for i in range(6)}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            SHAPES | {"layer_3": (2, 3)},
            "layer_3 has the shape (2, 3), the model has (3, 2)",
        ),
        (
            {name: shape for name, shape in SHAPES.items() if name != "layer_5"} | {"extra": (1,)},
            "extra of the shape (1,) is in no place of the model; "
            "layer_5 is missing, the model has it in the shape (5, 2)",
        ),
        (
            {},
            "layer_0 is missing, the model has it in the shape (0, 2); "
            "layer_1 is missing, the model has it in the shape (1, 2); "
            "layer_2 is missing, the model has it in the shape (2, 2); "
            "layer_3 is missing, the model has it in the shape (3, 2); 2 more",
        ),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(found, message):
    with pytest.raises(UserError) as error:
        check_shapes("run", found, SHAPES)
    assert str(error.value) == f"run is of another model or damaged: {message}"


def test_what_is_ignored_may_be_there_in_any_shape_or_not_at_all():
    check_shapes("run", SHAPES | {"extra": (9, 9)}, SHAPES, ignored={"extra", "another"})
    with pytest.raises(UserError, match="another of the shape"):
        check_shapes("run", SHAPES | {"another": ()}, SHAPES, ignored={"extra"})


# Two parameters. "w" is [layers, 3, 2], and each layer is a tensor [2, 3] of the other format. "b" is reversed there.
ENTRIES = {
    "w": Entry(("w0", "w1", "w2"), (2, 3), np.transpose, np.transpose, per_layer=True),
    "b": Entry(("bias",), (4,), np.flip, np.flip),
}
OURS = {"w": np.arange(18.0).reshape(3, 3, 2), "b": np.arange(4.0)}
THEIRS = {"w0": OURS["w"][0].T, "w1": OURS["w"][1].T, "w2": OURS["w"][2].T, "bias": np.array([3.0, 2, 1, 0])}


def test_their_tensors_make_up_our_parameters():
    reads = {name: [] for name in THEIRS}
    found = {name: reading(array, reads[name]) for name, array in THEIRS.items()}
    check_entries("run", found, ENTRIES)
    tensors = imported(found, ENTRIES)
    assert {name: (tensor.shape, tensor.dtype, tensor.stacked) for name, tensor in tensors.items()} == {
        "w": ((3, 3, 2), "float64", True),
        "b": ((4,), "float64", False),
    }
    # `imported` loads nothing. A request for one layer reads only this layer.
    assert not any(reads.values())
    np.testing.assert_array_equal(tensors["w"].read(1), OURS["w"][1])
    assert reads == {"w0": [], "w1": [None], "w2": [], "bias": []}
    for name, array in OURS.items():
        np.testing.assert_array_equal(tensors[name].read(None), array)


def test_our_parameters_make_their_tensors_layer_by_layer():
    reads = {name: [] for name in OURS}
    ours = {name: reading(array, reads[name], stacked=name == "w") for name, array in OURS.items()}
    tensors = exported(ours, ENTRIES)
    assert list(tensors) == ["w0", "w1", "w2", "bias"] and not any(reads.values())
    for name, array in THEIRS.items():
        got = tensors[name].read(None)
        assert tensors[name].shape == got.shape == array.shape and got.flags.c_contiguous
        np.testing.assert_array_equal(got, array)
    assert reads == {"w": [0, 1, 2], "b": [None]}


def test_tensors_of_another_format_are_checked_by_its_names():
    found = {name: from_array(array) for name, array in THEIRS.items() if name != "w1"} | {"w3": from_array(np.ones(2))}
    with pytest.raises(UserError, match=r"w1 is missing, the model has it in the shape \(2, 3\); w3 of the shape"):
        check_entries("run", found, ENTRIES)
    check_entries("run", found | {"w1": from_array(THEIRS["w1"])}, ENTRIES, ignored=["w3"])


@strategies.composite
def layouts(draw):
    """An entry that transposes and joins the axes of a random shape, and a parameter of this shape."""
    layers = draw(strategies.integers(0, 3))
    shape = tuple(draw(strategies.lists(strategies.integers(1, 3), min_size=1, max_size=3)))
    order = draw(strategies.permutations(range(len(shape))))
    turned = tuple(shape[axis] for axis in order)
    joined = (int(np.prod(turned)),) if draw(strategies.booleans()) else turned

    def theirs(array):
        return array.transpose(order).reshape(joined)

    def ours(array):
        return array.reshape(turned).transpose(np.argsort(order))

    whole = (layers, *shape) if layers else shape
    names = tuple(f"t{i}" for i in range(layers or 1))
    array = np.random.default_rng(draw(strategies.integers(0, 99))).random(whole)
    return Entry(names, joined, ours, theirs, per_layer=bool(layers)), array


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(layout=layouts())
def test_there_and_back_is_the_same_for_any_shapes(layout):
    entry, array = layout
    tensors = exported({"p": from_array(array, stacked=entry.per_layer)}, {"p": entry})
    assert {tensor.shape for tensor in tensors.values()} == {entry.shape}
    back = imported(tensors, {"p": entry})["p"]
    assert (back.shape, back.dtype, back.stacked) == (array.shape, "float64", entry.per_layer)
    np.testing.assert_array_equal(back.read(None), array)
    for layer in range(len(array)) if array.ndim > 1 else ():
        np.testing.assert_array_equal(back.read(layer), array[layer])
