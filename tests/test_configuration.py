"""Conversion between dataclasses and dictionaries."""

import dataclasses

import pytest

from alignment_gap.configuration import defaults, differences, flatten, from_dict, to_dict
from alignment_gap.errors import UserError


@dataclasses.dataclass(frozen=True)
class Cat:
    animal: str = "cat"
    lives: int = 9


@dataclasses.dataclass(frozen=True)
class Dog:
    animal: str = "dog"
    weight: float = 20.0


@dataclasses.dataclass(frozen=True)
class House:
    pet: Cat | Dog | None = Cat()
    garden: Dog = Dog()
    rooms: tuple[int, ...] = (1, 2)
    heights: tuple[float, ...] = (2.5,)
    open: bool = False


@pytest.mark.parametrize("house", [House(), House(Dog(weight=3.5), rooms=(), open=True), House(Cat(lives=1))])
def test_round_trip(house):
    assert from_dict(House, to_dict(house)) == house


def test_to_dict_by_hand():
    assert to_dict(House(Dog(), rooms=(4,))) == {
        "pet": {"animal": "dog", "weight": 20.0},
        "garden": {"animal": "dog", "weight": 20.0},
        "rooms": (4,),
        "heights": (2.5,),
        "open": False,
    }


def test_defaults_have_the_form_of_the_config():
    house = House(Dog(weight=3.0), Dog(weight=2.0), rooms=(4,))
    assert defaults(house) == to_dict(House(Dog()))
    # A group that is unset has no settings whose defaults could be meant.
    assert defaults(House(None))["pet"] is None


def test_differences_by_hand():
    assert differences(House()) == {}
    assert differences(House(Cat(lives=1), Dog(weight=3.0), open=True)) == {
        "pet": {"lives": 1},
        "garden": {"weight": 3.0},
        "open": True,
    }
    # A dog with default settings differs from a cat with default settings.
    assert differences(House(Dog())) == {"pet": {"type": "Dog"}}


def test_a_field_of_a_later_version_changes_no_difference_until_it_is_set():
    later = dataclasses.make_dataclass("House", [("colour", str, "red")], bases=(House,), frozen=True)
    assert differences(later(rooms=(4,))) == differences(House(rooms=(4,)))
    assert differences(later(rooms=(4,), colour="blue")) == {"rooms": (4,), "colour": "blue"}


def test_what_is_left_out_has_its_default():
    assert from_dict(House, {"garden": {"weight": 1.0}}) == House(garden=Dog(weight=1.0))


def test_the_tag_chooses():
    assert from_dict(House, {"pet": {"animal": "dog"}}).pet == Dog()


def test_whole_numbers_serve_as_floats_and_lists_as_tuples():
    house = from_dict(House, {"pet": {"animal": "dog", "weight": 3}, "rooms": [3], "heights": [2]})
    assert house == House(Dog(weight=3.0), rooms=(3,), heights=(2.0,))
    assert type(house.pet.weight) is float and type(house.heights[0]) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gardn": {}}, r"unknown key config\.gardn: did you mean garden\?"),
        ({"zzz": 1}, r"unknown key config\.zzz: choose one of pet, garden, rooms, heights, open"),
        ({"pet": {"animal": "cat", "live": 3}}, r"unknown key config\.pet\.live: did you mean lives\?"),
        ({"pet": {"animal": "cow"}}, r"config\.pet\.animal is 'cow': choose one of cat, dog"),
        # The error names the animal, though only a cat has lives.
        ({"pet": {"animal": "cow", "lives": 3}}, r"config\.pet\.animal is 'cow': choose one of cat, dog"),
        ({"pet": {"animal": "cat", "lives": 9.5}}, r"config\.pet\.lives is 9\.5: it must be of type int"),
        ({"pet": {"animal": "cat", "lives": True}}, r"config\.pet\.lives is True: it must be of type int"),
        ({"garden": {"weight": "heavy"}}, r"config\.garden\.weight is 'heavy': it must be of type float"),
        ({"garden": {"weight": True}}, r"config\.garden\.weight is True: it must be of type float"),
        ({"open": 1}, r"config\.open is 1: it must be of type bool"),
        ({"rooms": 3}, r"config\.rooms is 3: it must be a tuple such as \(3,\)"),
        ({"rooms": "12"}, r"config\.rooms is '12': it must be a tuple"),
        ({"rooms": ("a",)}, r"config\.rooms is 'a': it must be of type int"),
        ({"garden": 3}, r"config\.garden is 3: it must be a group of settings"),
        ({"pet": "dog"}, r"config\.pet is 'dog': it must be a group of settings"),
    ],
)
def test_bad_values_are_refused_by_their_path(values, message):
    with pytest.raises(UserError, match=message):
        from_dict(House, values)


def test_a_text_for_a_tuple_of_texts_is_refused():
    street = dataclasses.make_dataclass("Street", [("names", tuple[str, ...], ())])
    with pytest.raises(UserError, match=r"config\.names is 'one': it must be a tuple such as \('one',\)"):
        from_dict(street, {"names": "one"})


def test_flatten_by_hand():
    assert flatten({"a": 1, "b": {"c": (2, 3), "d": {"e": "f"}}}) == {"a": 1, "b.c": (2, 3), "b.d.e": "f"}
