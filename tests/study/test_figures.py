"""The figures: what they show, what they leave out (with a reason), and that they can be drawn."""

import dataclasses
import importlib
import json
import math
import re
import sys

import numpy as np
import pytest
from outside import REPLAYED

from alignment_gap.errors import UserError
from alignment_gap.evaluation import charts
from alignment_gap.study import analysis, figures, findings
from alignment_gap.study.analysis import CheckpointResult
from alignment_gap.study.arms import ARMS, GOLDEN, MAIN, OBJECTIVES, WINDOWS
from alignment_gap.study.claims import CLAIMS, answers
from alignment_gap.study.estimates import Evidence

ALL = ("win_rate", "rubric", "accuracy", "chosen_log_ratio", "rejected_log_ratio")


MAIN_ARMS = [arm for arm in ARMS if arm.panel == MAIN]


def run(arm, loss="ipo", *, beta=0.1, steps=(1, 2), seed=0, metrics=ALL, start=1.0):
    rng = np.random.default_rng([seed, len(arm), len(loss)])
    for step in steps:
        outcomes = {metric: rng.integers(0, 2, size=24).astype(float) for metric in metrics}
        outcomes["kl"] = np.full(8, start * step if arm != "sft" else 0.0)
        yield CheckpointResult(arm, loss, beta, math.nan if arm == "sft" else 1e-3, seed, step, outcomes)


def study(arms=("online", "offline", "shuffled"), losses=("ipo", "best_of_n"), seeds=(0,), metrics=ALL):
    results = []
    for seed in seeds:
        results += run("sft", "sft", beta=math.nan, steps=(0,), seed=seed, metrics=metrics)
        results += run("golden", "ipo", seed=seed, metrics=metrics)
        for loss in losses:
            beta = math.nan if loss == "best_of_n" else 0.1
            results += [result for arm in arms for result in run(arm, loss, beta=beta, seed=seed, metrics=metrics)]
    return results


def draw(results, arms=MAIN_ARMS):
    evidence, table = Evidence(results), analysis.results_table(results)
    comparisons, answered = findings.study_comparisons(evidence, arms), answers(evidence, CLAIMS)
    return {each.name: each for each in figures.study_figures(evidence, table, comparisons, answered, arms)}


def rows(figure):
    """The data of all charts of a figure."""
    found, stack = [], [figure.spec]
    while stack:
        part = stack.pop()
        found += part.get("data", {}).get("values", [])
        stack += [child for key in ("layer", "hconcat", "concat") for child in part.get(key, [])]
    return found


def tips(figure):
    """The fields of all tooltips."""
    found, stack = set(), [figure.spec]
    while stack:
        part = stack.pop()
        found |= {tip["field"] for tip in part.get("encoding", {}).get("tooltip", [])}
        stack += [child for key in ("layer", "hconcat", "concat") for child in part.get(key, [])]
    return found


@pytest.fixture(scope="module")
def drawn():
    return draw(study())


def test_the_papers_figures_are_there_in_order(drawn):
    assert list(drawn) == [
        "equal_kl_ipo",
        "equal_kl_ipo_rubric",
        "equal_kl_best_of_n",
        "equal_kl_best_of_n_rubric",
        "figure_4",
        "figure_4_rubric",
        "figure_7",
        "figure_7_rubric",
        "figure_8_ipo",
        "figure_8_best_of_n",
        "figure_9_best_of_n",
        "figure_9_best_of_n_rubric",
    ]
    assert not any(figure.missing for figure in drawn.values())


def test_every_figure_says_its_question_what_the_paper_saw_and_what_is_seen(drawn):
    for figure in drawn.values():
        assert figure.question.endswith("?") and figure.paper.endswith(".")
        assert figure.sentences and all(sentence.endswith(".") for sentence in figure.sentences)


def test_every_panel_of_the_table_has_a_question_of_its_own():
    assert {arm.panel for arm in ARMS} - {MAIN} == figures._PANELS.keys()


@pytest.mark.slow
def test_no_two_figures_say_the_same():
    """Even if the same functions draw many losses and panels."""
    windows = ("replayed", "small_windows", "large_windows")
    results = [*study(losses=("ipo", "best_of_n", "dpo", "slic")), *(each for arm in windows for each in run(arm))]
    found = draw(results, arms=[arm for arm in ARMS if arm.panel in (MAIN, WINDOWS)]).values()
    said = [text for each in found for text in (each.title, each.question, each.paper, *each.sentences)]
    assert len(said) == len(set(said)) > 80


def test_a_claim_stands_in_its_figure(drawn):
    found = {name: {answer.claim.figure for answer in figure.answers} for name, figure in drawn.items()}
    assert {name: figures for name, figures in found.items() if figures} == {
        "figure_4": {"1", "4"},
        "figure_7": {"7"},
        "figure_8_ipo": {"8"},
        "figure_9_best_of_n": {"9"},
    }


def test_specifications_are_strict_json_and_carry_their_data(drawn):
    for figure in drawn.values():
        text = json.dumps(figure.spec, allow_nan=False)
        assert "://" not in text.replace(figure.spec["$schema"], "")
        assert rows(figure)


@pytest.mark.parametrize("name", ["equal_kl_ipo", "figure_8_ipo", "figure_9_best_of_n"])
def test_png_is_drawn(drawn, name):
    assert drawn[name].png().startswith(b"\x89PNG")


def test_every_checkpoint_of_a_loss_is_a_mark_and_every_run_starts_at_the_origin(drawn):
    data = rows(drawn["figure_4"])
    marks = [row for row in data if not row.get("start") and "arm" in row]
    assert sorted((row["arm"], row["step"]) for row in marks) == sorted(
        [("sft", 0), *((arm, step) for arm in ("golden", "offline", "online", "shuffled") for step in (1, 2))]
    )
    starts = {row["arm"]: row["kl"] for row in data if row.get("start")}
    assert starts == dict.fromkeys(("golden", "offline", "online", "shuffled"), 0.0)


def test_ipo_lies_behind_best_of_n(drawn):
    behind = {row["loss"] for row in rows(drawn["figure_9_best_of_n"]) if row.get("behind")}
    before = {row["loss"] for row in rows(drawn["figure_9_best_of_n"]) if "arm" in row and not row.get("behind")}
    assert behind == {"IPO"}
    assert "Best-of-n" in before


def scales(figure, channel="color"):
    """The colour (or other mark) of each value, from all scales of a channel in the specification."""
    found, stack = {}, [figure.spec]
    while stack:
        part = stack.pop()
        encoded = part.get("encoding", {}).get(channel, {})
        if "scale" in encoded:
            found |= dict(zip(encoded["scale"]["domain"], encoded["scale"]["range"], strict=True))
        stack += [child for key in ("layer", "hconcat", "concat") for child in part.get(key, [])]
    return found


def legends(figure):
    """The fields that have a legend."""
    found, stack = set(), [figure.spec]
    while stack:
        part = stack.pop()
        encodings = part.get("encoding", {}).values()
        found |= {each["field"] for each in encodings if isinstance(each, dict) and each.get("legend")}
        stack += [child for key in ("layer", "hconcat", "concat") for child in part.get(key, [])]
    return found


def test_an_arm_has_the_colour_of_the_table_everywhere(drawn):
    table = {arm.name: arm.colour for arm in (*MAIN_ARMS, GOLDEN)}
    others = {"sft": "#5A5A5A", "online minus offline": charts.INK}
    for figure in drawn.values():
        assert scales(figure) and scales(figure).items() <= (table | others).items()
        assert "arm" in legends(figure)
    assert set(scales(drawn["figure_4"])) == {"sft", *table}


@pytest.mark.slow
def test_settings_that_differ_are_told_apart_with_a_legend_each():
    swept = [
        dataclasses.replace(result, beta=beta, learning_rate=rate, steps_factor=factor)
        for beta, rate, factor in ((0.1, 1e-3, 1), (0.5, 1e-3, 1), (1.0, 3e-3, 1), (0.1, 3e-3, 5))
        for result in run("offline")
    ]
    figure = draw([*study(losses=("ipo",)), *swept])["figure_4"]
    assert legends(figure) == {"arm", "beta", "rate", "steps"}
    fills, sizes, dashes = (scales(figure, name) for name in ("fillOpacity", "size", "strokeDash"))
    assert list(fills) == ["0.1", "0.5", "1"] and fills["0.1"] < 0.1 < fills["0.5"] < fills["1"] == 1
    assert list(sizes) == ["0.001", "0.003"] and sizes["0.003"] > 3 * sizes["0.001"]
    assert dashes == {"1x": [1, 0], "5x": [6, 3]}
    assert scales(figure)["offline"] == next(arm.colour for arm in ARMS if arm.name == "offline")
    # The lighter marks of another loss do not show settings.
    assert legends(draw([*study(), *swept])["figure_9_best_of_n"]) == {"arm"}
    assert figure.png().startswith(b"\x89PNG")


def test_an_arm_of_another_table_is_drawn_beside_the_known_ones():
    found = draw(study(arms=("online", "offline", "mirrored"), losses=("ipo",)), arms=(*MAIN_ARMS, REPLAYED))
    colours = scales(found["figure_4"])
    assert colours["mirrored"] == REPLAYED.colour
    assert len(set(colours.values())) == len(colours) == 5


def test_the_question_is_that_of_the_arms():
    """The first contrast of the arms makes the first figure, whatever the names of the arms."""
    found = draw(study(arms=("online", "mirrored"), losses=("ipo",)), arms=(REPLAYED, *MAIN_ARMS))
    (said,) = found["equal_kl_ipo"].sentences
    assert re.search(r" for mirrored and .* for online, in parentheses", said)
    assert set(scales(found["equal_kl_ipo"])) == {"mirrored", "online", "mirrored minus online"}


def test_the_arms_of_a_panel_are_drawn_with_those_that_they_are_compared_with():
    """With the first loss. No other figure has them."""
    windows = ("replayed", "small_windows", "large_windows")
    results = [*study(), *(result for arm in windows for result in run(arm))]
    found = draw(results, arms=[arm for arm in ARMS if arm.panel in (MAIN, WINDOWS)])
    assert list(found)[-2:] == ["figure_13", "figure_13_rubric"]
    assert set(scales(found["figure_13"])) == {"sft", "golden", "online", "shuffled", *windows}
    assert set(scales(found["figure_4"])) == {"sft", "golden", "online", "shuffled", "offline"}
    marks = [row for row in rows(found["figure_13"]) if row.get("arm") in ("online", *windows)]
    assert {row["loss"] for row in marks if not row.get("start")} == {"IPO"}
    assert {answer.claim.figure for answer in found["figure_13"].answers} == {"13"}
    assert all("windows" in said or "replayed" in said for said in found["figure_13"].sentences)
    assert found["figure_13"].png().startswith(b"\x89PNG")


def test_runs_at_other_settings_than_those_of_the_windows_are_left_out():
    """A sweep of the shuffled arm reaches so far in KL that the windows could not be told apart."""
    results = [*study(), *run("large_windows"), *run("shuffled", beta=0.01, start=30.0)]
    figure = draw(results, arms=[arm for arm in ARMS if arm.panel in (MAIN, WINDOWS)])["figure_13"]
    assert {row["setting"] for row in rows(figure) if row.get("arm") == "shuffled"} == {"beta 0.1, lr 0.001", ""}
    said, *others = figure.sentences
    assert said == "Figure 13: the win rate against the golden policy of runs with beta 0.1, lr 0.001 only."
    # So do the numbers in the other sentences: the sweep's checkpoints at 30 and 60 nats have no part in them.
    assert any("shuffled" in each for each in others) and not any(
        "30 nats" in each or "60 nats" in each for each in others
    )


def test_an_arm_with_a_loss_of_its_own_gives_no_figures_for_that_loss():
    results = [*study(losses=("ipo", "dpo")), *run("hypo", "hypo"), *run("chi_po", "chi_po")]
    found = draw(results, arms=[arm for arm in ARMS if arm.panel in (MAIN, OBJECTIVES)])
    assert [name for name in found if "hypo" in name or "chi_po" in name] == []
    drawn = {(row["arm"], row["loss"]) for row in rows(found["figure_offline_objectives"]) if "arm" in row}
    assert {("hypo", "hypo"), ("chi_po", "chi_po"), ("offline", "DPO")} < drawn and ("offline", "IPO") not in drawn


def test_a_panel_whose_arms_were_not_measured_says_so():
    found = draw(study(), arms=[arm for arm in ARMS if arm.panel in (MAIN, WINDOWS)])
    assert found["figure_13"].missing == "not measured: replayed, small_windows, large_windows"


@pytest.mark.slow
def test_the_gap_by_loss_is_drawn_for_three_losses_or_more():
    assert "figure_losses" not in draw(study())
    figure = draw(study(losses=("ipo", "dpo", "slic")))["figure_losses"]
    assert list(dict.fromkeys(row["loss"] for row in rows(figure) if "loss" in row)) == ["IPO", "DPO", "SLiC"]
    assert all(loss in figure.sentences[0] for loss in ("IPO", "DPO", "SLiC")) and legends(figure) == {"better"}
    assert figure.png().startswith(b"\x89PNG")


@pytest.mark.slow
def test_scores_other_than_fractions_keep_their_unit():
    """Percentage points are for win rates; a rubric's gap is in the rubric's own unit."""
    results = study(losses=("ipo", "dpo", "slic"))
    found, comparison = draw(results), Evidence(results).compared(("online", "ipo"), ("offline", "ipo"), "rubric")
    row = next(row for row in rows(found["figure_losses_rubric"]) if row.get("loss") == "IPO")
    assert row["value"] == pytest.approx(comparison.mean_gap.value) and abs(row["value"]) < 1
    values = [row["value"] for row in rows(found["equal_kl_ipo_rubric"]) if row.get("arm") == "online minus offline"]
    assert values == pytest.approx(comparison.gap.value, abs=1e-4)
    assert axes(found["equal_kl_ipo_rubric"]) == {"Rubric", "Gap, online minus offline (rubric score)"}


def test_other_pairs_are_classified_with_the_proxy_as_a_line():
    accuracies = ("stream_accuracy", "heldout_accuracy", "own_accuracy")
    results = study(losses=("ipo",), metrics=(*ALL, *accuracies))
    proxy = CheckpointResult("proxy", "preference", math.nan, math.nan, 0, 4, {accuracies[0]: np.full(24, 0.9)})
    figure = draw([*results, proxy])["figure_6"]
    assert [row["stream_accuracy"] for row in rows(figure) if row.get("arm") == "proxy"] == [0.9]
    assert axes(figure) == {"Accuracy on D_online", "Accuracy on held-out pairs of D_golden", "Accuracy on own samples"}
    assert {answer.claim.figure for answer in figure.answers} == {"6"}
    assert figure.png().startswith(b"\x89PNG")


@pytest.mark.slow
def test_along_training_the_seeds_of_a_setting_are_one_mark():
    results = study(losses=("ipo",), seeds=(0, 1, 2))
    figure = draw(results)["figure_8_ipo"]
    marks = [row for row in rows(figure) if row["arm"] == "online" and not row.get("start")]
    assert [(row["step"], row["seeds"]) for row in marks] == [(1, 3), (2, 3)]
    for row in marks:
        of_step = [r.mean("accuracy") for r in results if r.arm == "online" and r.step == row["step"]]
        ends = np.mean(of_step), min(of_step), max(of_step)
        assert [row[f"accuracy{end}"] for end in ("", "_low", "_high")] == pytest.approx(ends, abs=1e-5)
    (start,) = (row for row in rows(figure) if row["arm"] == "online" and row.get("start"))
    assert start["run"] == marks[0]["run"] and start["step"] == 0
    assert "the mean over the seeds of one setting" in figure.sentences[0]
    assert "seeds" in tips(figure) and "seed" not in tips(figure)
    alone = [row for row in rows(draw(study())["figure_8_ipo"]) if row["arm"] == "online"]
    assert {row["seed"] for row in alone} == {0} and "seed" in tips(draw(study())["figure_8_ipo"])


def test_a_setting_that_a_seed_lacks_starts_at_the_origin_too():
    """As in a report over an unfinished study."""
    results = study(losses=("ipo",), seeds=(0, 1, 2))
    results += [result for seed in (0, 1) for result in run("offline", beta=0.5, seed=seed)]
    data = [row for row in rows(draw(results)["figure_8_ipo"]) if row.get("beta") == "0.5"]
    assert [(row["step"], row.get("start"), row["seeds"]) for row in data] == [(0, True, 3), (1, None, 2), (2, None, 2)]


def test_the_proxies_of_all_seeds_are_one_line():
    accuracies = ("stream_accuracy", "heldout_accuracy", "own_accuracy")
    results = study(losses=("ipo",), seeds=(0, 1), metrics=(*ALL, *accuracies))
    for seed, share in ((0, 0.5), (1, 1.0)):
        right = (np.arange(24) < 24 * share).astype(float)
        results.append(CheckpointResult("proxy", "preference", math.nan, math.nan, seed, 4, {accuracies[0]: right}))
    (line,) = (row for row in rows(draw(results)["figure_6"]) if row.get("arm") == "proxy")
    assert (line["stream_accuracy"], line["seeds"]) == (0.75, 2)
    assert line["stream_accuracy_text"] == "75.0\u00a0% (50.0 to 100.0) by seed"


@pytest.mark.slow
def test_the_best_of_every_size_is_drawn_over_its_parameters():
    sizes = [dataclasses.replace(result, parameters=10) for result in study(losses=("ipo",))]
    results = [*sizes, *(dataclasses.replace(result, size="large", parameters=80) for result in sizes)]
    assert "figure_11" not in draw(sizes)
    figure = draw(results)["figure_11"]
    data = [row for row in rows(figure) if row["arm"] == "offline"]
    wins = [result.mean("win_rate") for result in sizes if result.arm == "offline"]
    online = [result.mean("win_rate") for result in sizes if result.arm == "online"]
    assert {row["parameters"] for row in data} == {10, 80}
    best = np.quantile(wins, 0.9)
    for row in data:
        assert row["best"] == pytest.approx(best)
        assert row["relative"] == pytest.approx(best / np.quantile(online, 0.9))
    assert {answer.claim.figure for answer in figure.answers} == {"11"}
    rubric = [result.mean("rubric") for result in sizes if result.arm == "offline"]
    true = {row["best"] for row in rows(draw(results)["figure_11_rubric"]) if row["arm"] == "offline"}
    assert true == {np.quantile(rubric, 0.9)}


def test_every_size_has_a_panel_over_kl():
    own = [dataclasses.replace(result, parameters=10) for result in study(losses=("ipo",))]
    # The proxy classifies pairs of the study; its parameters are not counted.
    proxy = CheckpointResult("proxy", "preference", math.nan, math.nan, 0, 4, {"stream_accuracy": np.full(24, 0.9)})
    large = [
        dataclasses.replace(
            r, size="large", parameters=8000, outcomes=r.outcomes | {"win_rate": np.full(24, r.step / 2)}
        )
        for r in own
    ]
    found = draw([*own, *large, proxy])
    figure = found["figure_10"]
    panels = {panel["title"]: panel["data"]["values"] for panel in figure.spec["concat"]}
    assert list(panels) == ["10 parameters", "8,000 parameters"]
    ends = [row["win_rate"] for row in panels["8,000 parameters"] if (row["arm"], row["step"]) == ("online", 2)]
    assert ends == [1.0] and {row["arm"] for row in panels["10 parameters"]} == {
        *("sft", "golden", "online", "offline", "shuffled")
    }
    assert [sentence.partition(":")[0] for sentence in figure.sentences] == [
        "With 10 parameters",
        "With 8,000 parameters",
    ]
    assert "figure_10_rubric" in found and "figure_10" not in draw(own)


def test_an_unknown_loss_is_drawn():
    found = draw(study(losses=("dpo",)))
    assert "DPO" in found["figure_4"].title and not found["figure_4"].missing


def test_several_seeds_are_separate_runs():
    found = draw(study(losses=("ipo",), seeds=(0, 1)))
    online = {row["run"] for row in rows(found["figure_4"]) if row.get("arm") == "online" and not row.get("start")}
    assert online == {"online ipo beta 0.1, lr 0.001 seed 0", "online ipo beta 0.1, lr 0.001 seed 1"}


def test_a_missing_metric_is_named():
    found = draw(study(losses=("ipo",), metrics=("win_rate",)))
    assert found["figure_4_rubric"].missing == "not measured: rubric"
    assert "accuracy" in found["figure_8_ipo"].missing
    assert not found["figure_4"].missing


def test_a_missing_arm_is_named_and_the_rest_is_drawn():
    found = draw(study(arms=("online",), losses=("ipo",)))
    assert "offline" in found["equal_kl_ipo"].missing
    assert not found["figure_4"].missing


def test_arms_that_share_no_kl_are_not_drawn_at_equal_kl():
    far = run("online", start=9.0)
    found = draw([*study(arms=("offline",), losses=("ipo",)), *far])
    assert "share no range of KL" in found["equal_kl_ipo"].missing
    assert not found["figure_4"].missing


def test_nothing_trained_draws_nothing():
    found = draw(study(arms=()))
    assert found and all(figure.missing for figure in found.values())


def test_a_loss_of_ones_own_is_in_titles_as_it_is_named_and_in_no_name_of_a_file():
    found = draw(study(losses=("ipo", "my.losses:hinge")))
    assert {name for name in found if "hinge" in name} == {
        *("equal_kl_my.losses_hinge", "equal_kl_my.losses_hinge_rubric"),
        *("figure_8_my.losses_hinge", "figure_9_my.losses_hinge", "figure_9_my.losses_hinge_rubric"),
    }
    assert found["figure_8_my.losses_hinge"].title == "Figure 8: classification along training, my.losses:hinge"


@pytest.mark.parametrize(
    ("package", "module"),
    [("altair", "evaluation.charts"), ("vl_convert", "evaluation.charts"), ("jinja2", "study.page")],
)
def test_without_the_extra_the_remedy_is_named(package, module, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"alignment_gap.{module}", raising=False)
    with pytest.raises(UserError, match=rf'^{package} .* is not installed: pip install "alignment-gap\[study\]"$'):
        importlib.import_module(f"alignment_gap.{module}")


def axes(figure):
    """The titles of the y axes."""
    found, stack = set(), [figure.spec]
    while stack:
        part = stack.pop()
        found.add(part.get("encoding", {}).get("y", {}).get("title"))
        stack += [child for key in ("layer", "hconcat", "concat") for child in part.get(key, [])]
    return found - {None}


def test_axes_are_named_after_the_metrics(drawn):
    assert axes(drawn["figure_4"]) == {"Win rate against the golden policy"}
    assert axes(drawn["figure_4_rubric"]) == {"Rubric score"}
    assert axes(drawn["figure_8_ipo"]) == {
        *("Accuracy on D_golden", "Winner's log-ratio to SFT (nats)", "Loser's log-ratio to SFT (nats)")
    }
    assert axes(drawn["equal_kl_ipo"]) == {"Win rate (%)", "Gap, online minus offline (percentage points)"}


def test_tooltips_give_every_measured_value_with_its_interval(drawn):
    (row,) = [r for r in rows(drawn["figure_4"]) if (r.get("arm"), r.get("step")) == ("online", 2)]
    ends = [f"{100 * row[name]:.1f}" for name in ("win_rate", "win_rate_low", "win_rate_high")]
    assert row["win_rate_text"] == f"{ends[0]}\u00a0% ({ends[1]} to {ends[2]})"
    assert row["kl_text"] == "2.00 nats (2.00 to 2.00)"
    tips = [tip["field"] for layer in drawn["figure_4"].spec["layer"] for tip in layer["encoding"].get("tooltip", [])]
    assert {"arm", "setting", "step", *(f"{metric}_text" for metric in (*ALL, "kl"))} <= set(tips)
