"""The figures of the controlled study: each is one Vega-Lite specification, for the page and for the PNG.

A figure comes with its question, with what the paper saw, and with what this study sees: the answers to its claims, and
sentences computed from its numbers. If its arms or metrics are missing, the figure says so instead.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from alignment_gap.evaluation import charts
from alignment_gap.evaluation.intervals import Band
from alignment_gap.study import analysis, findings
from alignment_gap.study.analysis import METRICS, OPPONENT, POLICIES_BESIDE_ARMS, PROXY, Comparison, Method, loss_name
from alignment_gap.study.arms import (
    BEST_OF_N,
    BEST_OF_N_OF_SFT,
    BEST_VS_WORST,
    BETAS,
    DATASETS,
    MAIN,
    OBJECTIVES,
    PROXY_LABELS,
    REFRESH,
    SELF_PLAY,
    WINDOWS,
    Arm,
    file_word,
)
from alignment_gap.study.claims import Answer
from alignment_gap.study.estimates import Evidence
from alignment_gap.study.marks import (
    HEIGHT,
    WIDTH,
    Figure,
    Row,
    axis,
    chart_row,
    estimates,
    kl_panels,
    level,
    over_kl,
    scatter,
    seeds_as_one,
    styles,
    tooltip,
    with_starts,
)

# What the paper saw under a loss, by figure; the paper has only IPO and best-of-2.
_AT_EQUAL_KL = {
    "ipo": "Online is at least as good as offline at every KL, on all four tasks.",
    "best_of_n": "Online is above offline, with chat arena as the exception.",
}
_OVER_KL = {
    "ipo": "Both branches rise, then fall: over-optimisation. Online's curve lies above offline's, and above that of "
    "its own data in random order.",
    "best_of_n": "The gap does not need a contrastive loss. Shuffled data of the online run does about as well as the "
    "run itself.",
}
_ALONG_TRAINING = {"ipo": "The log-probability of winners falls under every method, and offline's the most."}

# The question of a panel, and what the paper saw.
_PANELS = {
    WINDOWS: (
        "How much does the order of the online stream matter?",
        "Little within 4 batches; shuffled within 500 the stream loses part of what it gave online.",
    ),
    DATASETS: (
        "Which offline pairs help?",
        "Pairs with at least one side from SFT; neither contrast nor quality is enough by itself.",
    ),
    REFRESH: ("How fresh must the samples be?", "The paper stops at online and offline; 2506.21495 is between them."),
    BEST_OF_N: ("Does it help to train on the best of more samples?", "The paper takes the better of two."),
    BEST_OF_N_OF_SFT: (
        "Does training do more than choosing among samples of SFT?",
        "The paper does not choose among more than two; 2210.10760 does, and finds it to need less KL than training.",
    ),
    BEST_VS_WORST: (
        "Does it help to set the best of more samples against the worst?",
        "The paper labels both of two samples; 2405.07863 takes best and worst of more.",
    ),
    PROXY_LABELS: (
        "How many labels does the proxy need?",
        "Its proxy learns from all of D_golden, and agrees with the golden model on 70 to 90 % of it.",
    ),
    BETAS: (
        "Does online depend on the strength of its regularisation?",
        "It has online only at beta 0.1, and sweeps offline.",
    ),
    OBJECTIVES: (
        "Do offline objectives that bound the distance to SFT close the gap?",
        "The paper has none of them; they come from 2406.01462 and 2407.13399.",
    ),
    SELF_PLAY: (
        "Does play against a mixture with SFT beat plain online training?",
        "The paper does not mix; 2312.00886 and 2403.08635 do.",
    ),
}


def study_figures(
    evidence: Evidence,
    table: Sequence[Row],
    comparisons: Sequence[Comparison],
    answers: Sequence[Answer],
    arms: Sequence[Arm],
) -> list[Figure]:
    """All figures, in the order of the report; a figure without its numbers has a reason instead of a drawing.

    Args:
      evidence: the checkpoints of the study.
      table: a row for each checkpoint, from `analysis.results_table`.
      comparisons: the comparisons from `findings.study_comparisons`.
      answers: the answers from `claims.answers`.
      arms: arms of the study.
    """
    rows: dict[str, list[Row]] = {"": []}
    for result, means in zip(evidence.everything, table, strict=True):
        rows.setdefault(result.size, []).append(chart_row(result, means))
    study = _Study(evidence, rows[""], comparisons, answers, arms)
    # With a rubric, most figures are drawn a second time: the golden judge may be exploited, true quality is not.
    scores = ("win_rate", "rubric") if any("rubric" in row for row in study.rows) else ("win_rate",)
    trained = {*analysis.methods(evidence.results)}
    losses = [loss for loss in analysis.losses_of(evidence.results) if trained & {(arm, loss) for arm in study.main}]
    lead = losses[0] if losses else "ipo"
    figures = [_budget_figure(study, loss, metric) for loss in losses or [lead] for metric in scores]
    figures += [
        _main_figure(study, lead),
        _quality_figure(study, lead),
        *(_accuracy_figure(study, losses, metric) for metric in scores),
        *(_training_figure(study, loss) for loss in losses),
        *([_online_data_figure(study, lead)] if any("stream_accuracy" in row for row in study.rows) else []),
    ]
    for loss in losses[1:]:
        figures += [_loss_figure(study, loss, lead), _loss_quality_figure(study, loss, lead)]
    if len(evidence.sizes) > 1:
        figures += [_sizes_figure(study, rows, lead, metric) for metric in scores]
        figures += [_scale_figure(study, lead, metric) for metric in scores]
    if len(losses) > 2:
        figures += [_gaps_figure(study, metric) for metric in scores]
    panels = dict.fromkeys(arm.panel for arm in arms if arm.panel != MAIN)
    figures += [_panel_figure(study, panel, metric) for panel in panels for metric in scores]
    return figures


def main_arms(arms: Sequence[Arm]) -> list[str]:
    """The names of the arms of the main figures."""
    return [arm.name for arm in arms if arm.panel == MAIN]


# Data.


@dataclasses.dataclass(frozen=True)
class _Study:
    """The inputs of all figures: the checkpoints, a chart row for each, comparisons, answers to claims, arms."""

    evidence: Evidence
    rows: Sequence[Row]
    comparisons: Sequence[Comparison]
    answers: Sequence[Answer]
    arms: Sequence[Arm]

    def claims(self, *figures: str) -> tuple[Answer, ...]:
        """The answers to the claims about these figures of the paper."""
        return tuple(answer for answer in self.answers if answer.claim.figure in figures)

    @property
    def main(self) -> list[str]:
        """The arms of the main figures."""
        return main_arms(self.arms)

    def asked(self, metric: str = "win_rate") -> list[Comparison]:
        """The comparisons of the study's question, one for each loss."""
        return findings.asked(self.comparisons, self.arms, metric)

    def select(self, loss: str, metrics: Sequence[str], *, origins: bool = True) -> list[Row]:
        """The rows with all the metrics: main arms under a loss and, by default, origin and golden policy."""
        methods = {(arm, loss_name(loss)) for arm in self.main}
        return self.of_methods(methods, metrics, origins=origins)

    def of_methods(
        self, methods: Collection[tuple[str, str]], metrics: Sequence[str], *, origins: bool = True
    ) -> list[Row]:
        """The rows with all the metrics, for methods given as an arm and the words of a loss."""
        measured = [row for row in self.rows if all(metric in row for metric in metrics)]
        return [
            row
            for row in measured
            if (origins if row["arm"] in POLICIES_BESIDE_ARMS else (row["arm"], row["loss"]) in methods)
        ]

    def lacking(self, loss: str, metrics: Sequence[str]) -> str:
        """Why a figure of a loss and these metrics cannot be drawn; empty if it can."""
        trained = self.select(loss, (), origins=False)
        if not trained:
            return f"no arm was trained with {loss_name(loss)}"
        absent = [metric for metric in metrics if not any(metric in row for row in trained)]
        return f"not measured: {', '.join(absent)}" if absent else ""

    def at_equal_kl(self, comparison: Comparison) -> str:
        """All sentences on two arms at equal KL."""
        said = findings.equal_kl_headline(comparison), findings.equal_kl_detail(comparison)
        return " ".join(filter(None, (*said, findings.peaks_apart(self.evidence, comparison))))


def _saw(papers: Mapping[str, str], loss: str, what: str) -> str:
    """What the paper saw under a loss, or a sentence that the paper does not have it."""
    return papers.get(loss, f"The paper has no {what} under {loss_name(loss)}.")


def _titled(
    name: str, metric: str, title: str, question: str, paper: str, what: str, claims: tuple[Answer, ...] = ()
) -> Figure:
    """A figure's words. The paper and its claims are about the win rate; with true quality they have nothing `what`."""
    if metric == "win_rate":
        return Figure(name, title, question, paper, claims)
    without = f"The paper has no true quality {what}: it measures with the golden judge alone."
    return Figure(f"{name}_{metric}", title, question, without)


# Over KL.


def _main_figure(study: _Study, loss: str) -> Figure:
    words, question = loss_name(loss), "Does the win rate rise with KL and fall again, and does online stay above?"
    title = f"Figures 1 and 4: {METRICS['win_rate'].words} over KL to SFT, {words}"
    base = Figure("figure_4", title, question, _saw(_OVER_KL, loss, "win rates"), study.claims("1", "4"))
    return _over_kl(study, base, loss, "win_rate")


def _quality_figure(study: _Study, loss: str) -> Figure:
    title = f"As figure 4, true quality: {METRICS['rubric'].words} over KL to SFT, {loss_name(loss)}"
    question = "Does true quality follow the golden judge, or is the judge exploited?"
    paper = "It could not tell: it had the golden judge and nothing truer to hold it against."
    return _over_kl(study, Figure("figure_4_rubric", title, question, paper), loss, "rubric")


def _loss_figure(study: _Study, loss: str, lead: str) -> Figure:
    words, behind = loss_name(loss), loss_name(lead)
    title = f"Figure 9: {METRICS['win_rate'].words} over KL to SFT, {words}, with {behind} in lighter marks"
    question = f"Do the arms have the same order under {words} as under {behind}?"
    claims = study.claims("9") if loss == "best_of_n" else ()
    base = Figure(f"figure_9_{file_word(loss)}", title, question, _saw(_OVER_KL, loss, "win rates"), claims)
    return _over_kl(study, base, loss, "win_rate", behind=lead)


def _loss_quality_figure(study: _Study, loss: str, lead: str) -> Figure:
    words, behind = loss_name(loss), loss_name(lead)
    title = (
        f"As figure 9, true quality: {METRICS['rubric'].words} over KL to SFT, {words}, with {behind} in lighter marks"
    )
    question = f"Is the golden judge exploited under {words} too?"
    base = Figure(f"figure_9_{file_word(loss)}_rubric", title, question, _saw({}, loss, "true quality"))
    return _over_kl(study, base, loss, "rubric", behind=lead)


def _over_kl(study: _Study, base: Figure, loss: str, metric: str, behind: str = "") -> Figure:
    """A metric over KL to SFT for the arms of one loss; those of another loss are behind it in lighter marks."""
    if reason := study.lacking(loss, ("kl", metric)):
        return dataclasses.replace(base, missing=reason)
    rows = study.select(loss, ("kl", metric))
    if behind:
        rows += [row | {"behind": True} for row in study.select(behind, ("kl", metric), origins=False)]
    spec = charts.finish(over_kl(rows, study.arms, metric))
    return dataclasses.replace(base, sentences=_kl_sentences(study, loss, metric), spec=spec)


def _kl_sentences(study: _Study, loss: str, metric: str) -> tuple[str, ...]:
    """Sentences on the figure; win rates of online and offline at equal KL are left out, as the page has them above."""
    apart = study.asked()
    of_loss = [c for c in study.comparisons if c.metric == metric and c.first[1] == loss and c not in apart]
    found = [study.at_equal_kl(c) for c in of_loss if c.first[0] in study.main]
    if metric == "rubric":
        branches: list[Method] = [(arm, loss) for arm in findings.question(study.arms)]
        found += [findings.over_optimisation(study.evidence, branch) for branch in branches]
    return tuple(filter(None, found))


def _panel_figure(study: _Study, panel: str, metric: str) -> Figure:
    """A metric over KL for a panel's arms and the arms that they are compared with."""
    word = re.sub(r"\W+", "_", panel.lower()).removeprefix("figures_").removeprefix("figure_")
    question, paper = _PANELS.get(panel, (f"How do the arms of {panel} compare?", f"{panel} is not in the paper."))
    if metric != "win_rate":
        question = f"What of that is true quality: {panel}?"
    title, claims = f"{panel}: {METRICS[metric].words} over KL to SFT", study.claims(*re.findall(r"\d+", panel))
    base = _titled(f"figure_{word}", metric, title, question, paper, f"of {panel}", claims)
    arms = {arm.name: arm for arm in study.arms if arm.panel == panel}
    methods = {(r.arm, r.loss) for r in study.evidence.results if r.arm in arms}
    others = {(c.other, c.loss or loss) for arm, loss in methods for c in arms[arm].contrasts}
    drawn = {(arm, loss_name(loss)) for arm, loss in methods | others}
    rows = study.of_methods(drawn, ("kl", metric))
    if not any(row["arm"] in arms for row in rows):
        return dataclasses.replace(base, missing=f"not measured: {', '.join(arms)}")
    said = [study.at_equal_kl(c) for c in study.comparisons if c.metric == metric and c.first[0] in arms]
    if all(contrast.at_shared_settings for arm in arms.values() for contrast in arm.contrasts):
        settings = {row["setting"] for row in rows if row["arm"] in arms}
        shared = [row for row in rows if row["arm"] in POLICIES_BESIDE_ARMS or row["setting"] in settings]
        if len(shared) < len(rows):
            words = METRICS[metric].words
            rows, said = shared, [f"{panel}: the {words} of runs with {' or '.join(sorted(settings))} only.", *said]
    return dataclasses.replace(base, sentences=tuple(said), spec=charts.finish(over_kl(rows, study.arms, metric)))


# At equal KL.


def _budget_figure(study: _Study, loss: str, metric: str) -> Figure:
    """The best score of online and of offline within each KL budget, and their gap."""
    words, pair, score = loss_name(loss), findings.question(study.arms), metric.replace("_", " ")
    better = "is better" if metric == "win_rate" else "has more true quality"
    question = f"Within one budget of KL, which {better} under {words}: {' or '.join(pair)}?"
    paper, what = _saw(_AT_EQUAL_KL, loss, "comparison at equal KL"), f"at equal KL under {words}"
    title = f"The question: best {score} within a KL budget, {words}"
    base = _titled(f"equal_kl_{file_word(loss)}", metric, title, question, paper, what)
    comparison = next((c for c in study.asked(metric) if c.first[1] == loss), None)
    if comparison is None:
        needed = ", of ".join((*pair, "SFT"))
        return dataclasses.replace(base, missing=f"it needs checkpoints of {needed}, with KL and {score}")
    first, second = pair
    if len(comparison.budgets) < 2:
        missing = f"the checkpoints of {first} and of {second} share no range of KL"
        return dataclasses.replace(base, missing=missing)
    frontiers = [
        *_band_rows(comparison, comparison.first_frontier, first),
        *_band_rows(comparison, comparison.second_frontier, second),
    ]
    scale = alt.Scale(type="sqrt", zero=False, nice=False, padding=8)
    x = alt.X(
        "budget:Q",
        title="KL budget (nats, square-root scale)",
        scale=scale,
        axis=alt.Axis(format=".3~g", tickCount=6),
    )
    title = f"{score.capitalize()}{' (%)' if METRICS[metric].is_share else ''}"
    left = _band_chart(frontiers, x, title).encode(styles(frontiers, study.arms)[0])
    minus = f"{first} minus {second}"
    gap = _band_chart(_band_rows(comparison, comparison.gap, minus), x, f"Gap, {minus} ({_unit_of_gaps(metric)})")
    scale = alt.Scale(domain=[minus], range=[charts.INK])
    right = alt.layer(level(0.0), gap.encode(alt.Color("arm:N", scale=scale, legend=alt.Legend(title=None))))
    chart = alt.hconcat(*(side.properties(width=WIDTH, height=300) for side in (left, right)))
    said = (findings.frontiers_sentence(comparison),)
    return dataclasses.replace(base, sentences=said, spec=charts.finish(chart.resolve_scale(color="independent")))


def _in_unit(value: Any, metric: str) -> Any:
    """Numbers in the unit of their axis: fractions in per cent."""
    return 100 * value if METRICS[metric].is_share else value


def _unit_of_gaps(metric: str) -> str:
    return "percentage points" if METRICS[metric].is_share else METRICS[metric].words


def _band_rows(comparison: Comparison, band: Band, arm: str) -> list[Row]:
    """A row per budget; fractions in per cent."""
    ends = (_in_unit(values, comparison.metric) for values in (band.value, band.low, band.high))
    columns, names = zip(comparison.budgets, *ends, strict=True), ("budget", "value", "low", "high")
    return [{"arm": arm} | dict(zip(names, (round(float(v), 4) for v in row), strict=True)) for row in columns]


def _band_chart(rows: Sequence[Row], x: alt.X, title: str) -> alt.LayerChart:
    """Estimates as a line, with their intervals as a band."""
    base, scale = alt.Chart(alt.Data(values=list(rows))).encode(x), alt.Scale(zero=False)
    tips = [alt.Tooltip(f"{field}:Q", format=".3~r") for field in ("budget", "value", "low", "high")]
    band = base.mark_area(opacity=0.2).encode(alt.Y("low:Q", title=title, scale=scale), alt.Y2("high:Q"))
    line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=16))
    return alt.LayerChart(layer=[band, line.encode(alt.Y("value:Q", title=title), tooltip=["arm:N", *tips])])


def _gaps_figure(study: _Study, metric: str) -> Figure:
    """The gap of the study's question at equal KL, with a mark for each loss."""
    score = metric.replace("_", " ")
    base = _titled(
        "figure_losses",
        metric,
        f"Is it the loss? The gap in {score} at equal KL, by loss",
        f"Under which losses is there a gap in {score} at equal KL?",
        "Two losses, IPO and best-of-2, have it.",
        "by loss",
    )
    asked = [c for c in study.asked(metric) if len(c.budgets)]
    if not asked:
        return dataclasses.replace(base, missing="no loss has arms that share a range of KL")
    first, second = asked[0].first[0], asked[0].second[0]
    values = [
        {"loss": loss_name(c.first[1]), "better": c.better or "neither can be claimed"}
        | {end: _in_unit(getattr(c.mean_gap, end), metric) for end in ("value", "low", "high")}
        for c in asked
    ]
    colours = {arm.name: arm.colour for arm in study.arms} | {"neither can be claimed": charts.LINE}
    domain = [name for name in (first, second, "neither can be claimed") if any(v["better"] == name for v in values)]
    scale = alt.Scale(domain=domain, range=[colours[name] for name in domain])
    colour = alt.Color("better:N", scale=scale, legend=alt.Legend(title="better"))
    chart = alt.Chart(alt.Data(values=values)).encode(alt.Y("loss:N", title=None, sort=None), colour)
    words = f"Gap, {first} minus {second} ({_unit_of_gaps(metric)})"
    drawn = estimates(chart, words, ("loss",)).properties(width=WIDTH, height=34 * len(values))
    return dataclasses.replace(base, sentences=(findings.gaps_sentence(asked),), spec=charts.finish(drawn))


# Over sizes.


def _sizes_figure(study: _Study, rows: Mapping[str, Sequence[Row]], loss: str, metric: str) -> Figure:
    """A score over KL with a panel for each size, the smallest first; `rows` are the chart rows of every size."""
    base = _titled(
        "figure_10",
        metric,
        f"Figure 10: {METRICS[metric].words} over KL to SFT by size of the policy, {loss_name(loss)}",
        f"Is the order of the arms by {METRICS[metric].words} the same for small and for large policies?",
        "It sets XL beside Large: a larger policy does not close the gap.",
        "by size",
    )
    methods: list[Method] = [(arm, loss) for arm in findings.question(study.arms)]
    panels, said = {}, []
    for name, size in study.evidence.sizes.items():
        of_size, parameters = dataclasses.replace(study, rows=rows[name]), size.parameters
        if of_size.lacking(loss, ("kl", metric)):
            continue
        panels[f"{parameters:,} parameters"] = of_size.select(loss, ("kl", metric))
        if len(methods) == 2 and (comparison := size.compared(*methods, metric)):
            said.append(f"With {parameters:,} parameters: {findings.equal_kl_detail(comparison)}")
    if not panels:
        return dataclasses.replace(base, missing=f"no size has {METRICS[metric].words}")
    spec = charts.finish(kl_panels(panels, study.arms, metric))
    return dataclasses.replace(base, sentences=tuple(said), spec=spec)


def _scale_figure(study: _Study, loss: str, metric: str) -> Figure:
    """The best score of every arm over the number of parameters, absolute and relative to online."""
    score = metric.replace("_", " ")
    base = _titled(
        "figure_11",
        metric,
        f"Figures 11 and 14: best {score} over the size of the policy, {loss_name(loss)}",
        "Does the gap close as policies grow?" if metric == "win_rate" else "Does true quality grow with the policy?",
        "Not by much. It narrows on two of three tasks between online and shuffled, and more slowly for offline.",
        "over sizes",
        study.claims("11", "14"),
    )
    values = [row for size in study.evidence.sizes.values() for row in _best_rows(study, size, loss, metric)]
    if not values:
        return dataclasses.replace(base, missing=f"no arm has {METRICS[metric].words} at several sizes")
    x = alt.X("parameters:Q", title="Parameters (logarithmic)", scale=alt.Scale(type="log", base=2, nice=False))
    colour, _, shape = styles(values, study.arms)
    sides = []
    for field, words in (("best", f"90 % quantile of the {score}"), ("relative", "The same, relative to online's")):
        chart = alt.Chart(alt.Data(values=values)).transform_filter(f"isValid(datum.{field})").encode(x)
        y = alt.Y(f"{field}:Q", title=words, scale=alt.Scale(zero=False))
        marks = chart.mark_point(filled=True, size=55).encode(
            y, colour, shape, tooltip=["arm:N", "seed:N", f"{field}:Q"]
        )
        line = chart.mark_line(strokeWidth=1.5).encode(alt.Y(f"mean({field}):Q", title=words), colour)
        sides.append(alt.layer(line, marks).properties(width=WIDTH, height=300))
    mark = "A mark is a seed: the 90 % quantile over all checkpoints of all runs of the arm at that size."
    said = (mark, _growth(values, metric))
    return dataclasses.replace(base, sentences=said, spec=charts.finish(alt.hconcat(*sides)))


def _growth(values: Sequence[Row], metric: str) -> str:
    """A sentence with the quantile of every arm at the smallest and at the largest size."""
    ends = [min(row["parameters"] for row in values), max(row["parameters"] for row in values)]
    found = []
    for arm in dict.fromkeys(row["arm"] for row in values):
        at = [[row["best"] for row in values if row["arm"] == arm and row["parameters"] == end] for end in ends]
        if all(at):
            found.append(f"{arm} {' to '.join(findings.plain(float(np.mean(each)), metric) for each in at)}")
    return f"From {ends[0]:,} to {ends[1]:,} parameters it goes: {', '.join(found)}."


def _best_rows(study: _Study, size: Evidence, loss: str, metric: str) -> list[Row]:
    """A row for each arm and seed of a size: the 90 % quantile of a score, and its ratio to online's."""
    best: dict[tuple[str, int], float] = {}
    for arm, seed in itertools.product(study.main, size.seeds):
        measured = [r for r in size.results if r.method == (arm, loss) and r.seed == seed and metric in r.outcomes]
        if measured:
            best[arm, seed] = float(np.quantile([result.mean(metric) for result in measured], 0.9))
    return [
        {"arm": arm, "seed": seed, "parameters": size.parameters, "best": value}
        | ({"relative": value / best["online", seed]} if best.get(("online", seed)) else {})
        for (arm, seed), value in best.items()
    ]


# Classification.


def _accuracy_figure(study: _Study, losses: Sequence[str], metric: str) -> Figure:
    """A score over classification accuracy for every checkpoint, with a panel per loss."""
    base = _titled(
        "figure_7",
        metric,
        f"Figure 7: {METRICS[metric].words} over accuracy on D_golden",
        f"Has a policy that tells winners from losers better a higher {METRICS[metric].words}?",
        "No. Offline policies reach 60 to 70 % on D_golden, online ones about 50 % or less, and online wins more.",
        "over accuracy",
        study.claims("7"),
    )
    metrics = (metric, "accuracy")
    drawn = [loss for loss in losses if not study.lacking(loss, metrics)]
    if not drawn:
        return dataclasses.replace(base, missing=f"not measured together: {metric}, accuracy")
    selected = {loss: study.select(loss, metrics) for loss in drawn}
    everything = [row for rows in selected.values() for row in rows]
    x = axis(alt.X, "accuracy", nice=False, padding=12)
    panels = [
        alt.layer(
            *scatter(everything, study.arms, x, metric, lines=False),
            data=alt.Data(values=with_starts(rows)),
        ).properties(width=WIDTH, height=HEIGHT, title=loss_name(loss))
        for loss, rows in selected.items()
    ]
    spanned = "accuracy" if metric == "win_rate" else metric
    said = tuple(findings.spans_sentence(study.evidence, loss, study.main, spanned) for loss in drawn)
    return dataclasses.replace(base, sentences=said, spec=charts.finish(alt.concat(*panels, columns=2)))


def _training_figure(study: _Study, loss: str) -> Figure:
    """Accuracy and the log-probabilities of winner and loser along training."""
    words, metrics = loss_name(loss), ("accuracy", "chosen_log_ratio", "rejected_log_ratio")
    base = Figure(
        f"figure_8_{file_word(loss)}",
        f"Figure 8: classification along training, {words}",
        f"What does {words} do to the log-probabilities of winners and losers, and to accuracy?",
        _saw(_ALONG_TRAINING, loss, "classification"),
        study.claims("8") if loss == "ipo" else (),
    )
    if reason := study.lacking(loss, metrics):
        return dataclasses.replace(base, missing=reason)
    rows = seeds_as_one([row for row in study.select(loss, metrics) if row["arm"] != OPPONENT], metrics)
    chart = alt.hconcat(*_along_training(study, rows, metrics), data=alt.Data(values=with_starts(rows)))
    said = (*_of_seeds(study), findings.ends_sentence(study.evidence, loss, study.main, metrics))
    return dataclasses.replace(base, sentences=said, spec=charts.finish(chart))


def _online_data_figure(study: _Study, loss: str) -> Figure:
    """Accuracy along training on D_online, on held-out pairs and on own samples; the proxy's accuracy is a line."""
    base = Figure(
        "figure_6",
        f"Figure 6: classification of other pairs along training, {loss_name(loss)}",
        "Who classifies pairs best that it did not train on?",
        "The proxy, better than any policy of its size; on their own samples policies are near chance.",
        study.claims("6"),
    )
    names = ("stream_accuracy", "heldout_accuracy", "own_accuracy")
    metrics = [metric for metric in names if any(metric in row for row in study.rows)]
    rows = seeds_as_one([row for row in study.select(loss, metrics) if row["arm"] != OPPONENT], metrics)
    proxies = seeds_as_one([row for row in study.rows if row["arm"] == PROXY[0]], metrics)
    colour = styles([*rows, *proxies], study.arms)[0]
    panels = []
    for metric, panel in zip(metrics, _along_training(study, [*rows, *proxies], metrics), strict=True):
        measured = [row for row in proxies if metric in row]
        line = alt.Chart(alt.Data(values=measured)).mark_rule(strokeDash=[6, 3])
        drawn = [line.encode(axis(alt.Y, metric), colour, tooltip=tooltip(measured))] if measured else []
        panels.append(alt.layer(panel, *drawn).properties(width=panel.width, height=panel.height))
    chart = alt.hconcat(*panels, data=alt.Data(values=with_starts(rows)))
    said = findings.ends_sentence(study.evidence, loss, study.main, metrics)
    line = "The dashed line is the proxy preference model."
    sentences = (line, *_of_seeds(study), *filter(None, (said,)))
    return dataclasses.replace(base, sentences=sentences, spec=charts.finish(chart))


def _of_seeds(study: _Study) -> tuple[str, ...]:
    """A sentence on what a mark and its bar are, if there are several seeds."""
    said = "A mark is the mean over the seeds of one setting; its bar goes from the lowest seed to the highest."
    return (said,) if len(study.evidence.seeds) > 1 else ()


def _along_training(
    study: _Study, rows: Sequence[Row], metrics: Sequence[str]
) -> list[alt.LayerChart | alt.FacetChart]:
    """A panel for each metric, over steps; runs of few steps have room beside runs of many."""
    scale = alt.Scale(type="sqrt", zero=False, nice=False, padding=12)
    x = alt.X("step:Q", title="Gradient steps (square-root scale)", scale=scale, axis=alt.Axis(tickCount=6))
    return [alt.layer(*scatter(rows, study.arms, x, metric)).properties(width=325, height=260) for metric in metrics]
