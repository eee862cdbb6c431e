"""Checks of settings: the values that they refuse, and errors that name value, limit and remedy."""

import dataclasses
import math

import pytest

from alignment_gap import checks
from alignment_gap.configuration import from_dict
from alignment_gap.errors import UserError


@dataclasses.dataclass(frozen=True)
class Oven:
    heat: float | None = None
    racks: int = 1
    mode: str = "bake"

    def __post_init__(self):
        checks.above(self, 0, "heat")
        checks.at_least(self, 1, "racks")
        checks.within(self, 1, 4, "racks")
        checks.one_of(self, ("bake", "grill"), "mode")


@dataclasses.dataclass(frozen=True)
class Kitchen:
    oven: Oven = Oven()


def test_what_is_in_range_or_not_set_passes():
    assert Oven(heat=1e-9, racks=4, mode="grill").heat == 1e-9
    assert Oven().heat is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heat": 0.0}, "heat is 0.0: it must be above 0 and finite"),
        ({"heat": math.nan}, "heat is nan: it must be above 0 and finite"),
        ({"heat": math.inf}, "heat is inf: it must be above 0 and finite"),
        ({"racks": 0}, "racks is 0: it must be at least 1"),
        ({"racks": math.nan}, "racks is nan: it must be at least 1"),
        ({"racks": 5}, "racks is 5: it must be from 1 to 4"),
        ({"mode": "gril"}, "mode is 'gril': did you mean grill?"),
        ({"mode": "xyz"}, "mode is 'xyz': choose one of bake, grill"),
    ],
)
def test_what_is_out_of_range_is_refused_in_one_line(settings, message):
    with pytest.raises(UserError) as error:
        Oven(**settings)
    assert str(error.value) == message


def test_a_tree_of_settings_names_the_path():
    with pytest.raises(UserError, match=r"^study\.oven\.racks is 0: it must be at least 1$"):
        from_dict(Kitchen, {"oven": {"racks": 0}}, path="study")
