"""The diagrams of a study have its jobs as boxes and the inputs of jobs as lines, and nothing else."""

import dataclasses
import pathlib

from alignment_gap.study.diagrams import diagram_figures
from alignment_gap.study.graph import study_graph


def lines_and_boxes(figure):
    lines, boxes, _ = figure.spec["layer"]
    return (
        {line["edge"] for line in lines["data"]["values"]},
        {box["job"]: (box["x"], box["y"]) for box in boxes["data"]["values"]},
    )


def diagrams(config, tmp_path, **arms):
    config = dataclasses.replace(config, seed=3, arms=dataclasses.replace(config.arms, **arms))
    return {figure.name: figure for figure in diagram_figures(study_graph(config, tmp_path), config.arms.losses[0])}


def test_the_workflow_is_that_of_the_paper(config, tmp_path):
    edges, places = lines_and_boxes(diagrams(config, tmp_path)["figure_2"])
    assert {
        *("human pairs to golden model", "human pairs to D_golden", "golden model to D_golden"),
        *("D_golden to proxy model", "proxy model to online", "D_golden to offline", "golden model to golden policy"),
    } < edges
    assert not {"golden model to online", "proxy model to offline", "human pairs to offline"} & edges
    assert all(places[start][0] < places[end][0] for start, end in (edge.split(" to ") for edge in edges))


def test_the_diagrams_are_those_of_the_first_loss(config, tmp_path):
    drawn = diagrams(config, tmp_path, losses=("dpo", "slic"))
    edges, _ = lines_and_boxes(drawn["figure_2"])
    assert {"proxy model to online", "D_golden to offline", "golden model to golden policy"} < edges
    assert lines_and_boxes(drawn["figure_3"])[0] == {"online to shuffled"}


def test_the_arms_that_read_the_online_run(config, tmp_path):
    figure = diagrams(config, tmp_path, further=("replayed", "sft_vs_early"))["figure_3"]
    edges, places = lines_and_boxes(figure)
    assert edges == {
        *("online to shuffled", "online to replayed", "online to pairs sft vs early"),
        "pairs sft vs early to sft vs early",
    }
    assert len(set(places.values())) == len(places)


def test_a_diagram_is_drawn(config, tmp_path):
    assert diagrams(config, tmp_path)["figure_2"].png().startswith(b"\x89PNG")


def test_a_study_without_arms_has_no_diagram_of_the_online_run(config):
    arms = dataclasses.replace(config.arms, names=())
    graph = study_graph(dataclasses.replace(config, arms=arms), pathlib.Path("jobs"))
    workflow, stream = diagram_figures(graph, "ipo")
    assert workflow.spec and not workflow.missing
    assert stream.missing == "this study has none of its jobs"
