"""The progress bar."""

from alignment_gap.progress import progress_bar


def test_work_of_an_earlier_run_is_shown_but_is_no_part_of_the_rate():
    with progress_bar(10, "job") as bar:
        bar.update(4)
        bar.unpause()
        bar.update(2)
        told = bar.format_dict
    assert told["n"] == 6 and told["initial"] == 4
