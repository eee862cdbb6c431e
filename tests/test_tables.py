"""Tables for a terminal."""

from alignment_gap.tables import text_table


def test_columns_of_a_table_are_as_wide_as_their_widest_cell():
    table = text_table(["mean", "step 10", "step 200"], [["kl", "0.1", "0.25 (0.2 to 0.3)"], ["accuracy", "", "1"]])
    assert table.split("\n") == [
        "mean      step 10  step 200",
        "kl        0.1      0.25 (0.2 to 0.3)",
        "accuracy           1",
    ]


def test_a_table_without_rows_is_its_headers():
    assert text_table(["a", "long name"], []) == "a  long name"
