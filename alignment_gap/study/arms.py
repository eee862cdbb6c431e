"""The table of arms: what each arm reads, what it is compared with, and how it is drawn.

An arm is one entry. `StudyConfig.arms` lists a study's arms by name, or as "module:object" for your own arm. Everything
that the graph, the figures and the report know about arms is in this table.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignment_gap.checkpoints import CHECKPOINTS
from alignment_gap.checks import nearest
from alignment_gap.configuration import load_named
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath
from alignment_gap.jobs.config import DatasetConfig, OnlineConfig, SourceConfig
from alignment_gap.jobs.record import RECORD
from alignment_gap.judges import JudgeConfig
from alignment_gap.sampling import SamplerConfig
from alignment_gap.study.analysis import NO_ARMS, OPPONENT

# The figures in which arms are drawn, together with the arms that they are compared with.
MAIN, WINDOWS, DATASETS = "Figures 1 and 4", "Figure 13", "Figures 5 and 12"
REFRESH, BEST_OF_N, BEST_VS_WORST = "Semi-online", "Best-of-n", "Best against worst of n"
OBJECTIVES, SELF_PLAY = "Offline objectives", "Self-play"
PROXY_LABELS, BETAS, BEST_OF_N_OF_SFT = "Labels of the proxy", "Beta", "Best of n samples of SFT"
# The shapes of marks that Vega draws by name.
SHAPES = (
    *("circle", "square", "cross", "diamond", "triangle", "triangle-up", "triangle-down", "triangle-right"),
    *("triangle-left", "arrow", "wedge", "stroke"),
)
# b in the mixture pi^(1 - b) ref^b of Nash-MD and IPO-MD.
MIXTURE = 0.125


class _NoRun(UserError):
    """An arm reads the run of an arm that does not come before it."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """The inputs that an arm can read: the jobs of one seed, and the earlier arms under the same loss.

    Attributes:
      golden: the run of the golden preference model.
      proxy: the run of the proxy preference model.
      sft: the run of the SFT policy.
      golden_pairs: the dataset D_golden: the human pairs with the golden model's labels.
      batch_size: prompts per step, the same for all arms.
      sampler: how fresh pairs are sampled.
      checkpoint_steps: checkpoint steps of an arm; the last is its number of steps.
      runs: runs of the earlier arms, by name; for a swept arm, the first run.
      proxy_of: `labels -> run` adds a proxy that learns from this number of D_golden's labels.
      pairs: `(name, policies) -> dataset` adds a job that samples pairs for the prompts of D_golden: one response from
        each of two policies, or two from one policy, labelled by the golden model. Equal names mean the same job.
    """

    golden: AnyPath
    proxy: AnyPath
    sft: AnyPath
    golden_pairs: AnyPath
    batch_size: int
    sampler: SamplerConfig
    checkpoint_steps: tuple[int, ...]
    runs: Mapping[str, AnyPath]
    proxy_of: Callable[[int], AnyPath]
    pairs: Callable[[str, Sequence[AnyPath]], AnyPath]

    def run_of(self, arm: str) -> AnyPath:
        """The run of another arm under the same loss; raises UserError if that arm does not come before this one."""
        if arm not in self.runs:
            raise _NoRun(f"config.arms.names has an arm that reads the run of {arm!r}: add {arm!r} before it")
        return self.runs[arm]

    def early_of(self, arm: str) -> AnyPath:
        """Another arm's checkpoint nearest to a fifth of its steps, like the paper's step 800 of 4,000."""
        fifth = self.checkpoint_steps[-1] / 5
        step = min(self.checkpoint_steps, key=lambda step: abs(step - fifth))
        return self.run_of(arm) / CHECKPOINTS / str(step)

    def dataset(self, folder: AnyPath, **settings: Any) -> DatasetConfig:
        """Batches of recorded pairs; `settings` replace defaults."""
        return DatasetConfig(str(folder), batch_size=self.batch_size, **settings)

    def stream(self, share: int) -> DatasetConfig:
        """D_online, shuffled within windows of 1/`share` of the run's steps, but at least two batches."""
        window = max(2, self.checkpoint_steps[-1] // share)
        return self.dataset(self.run_of("online") / RECORD, order="window", window=window)

    def online(self, labels: str = "hard", proxy_labels: int | None = None, **settings: Any) -> OnlineConfig:
        """Recorded fresh samples for the prompts of D_golden, labelled by the proxy or by a proxy of fewer labels."""
        judge = JudgeConfig(str(self.proxy if proxy_labels is None else self.proxy_of(proxy_labels)), labels=labels)
        return OnlineConfig(self.dataset(self.golden_pairs), judge=judge, sampler=self.sampler, **settings)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A question about two arms: is this arm better than another at equal KL? `claims` has the paper's answers.

    Attributes:
      other: name of the other arm.
      loss: loss of the other arm; empty for the loss of this arm.
      at_shared_settings: whether only runs at settings that both arms have count, because a sweep has more tries than
        one run. It narrows the range of KL that both share: online training goes further at the same setting.
    """

    other: str
    loss: str = ""
    at_shared_settings: bool = False


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of the study.

    Attributes:
      name: name of the arm.
      reads: what it trains on, as a phrase that follows its name in the report.
      source: the batches that it trains on; None if no policy is trained.
      best_of: instead of training, the proxy chooses the best of n samples of SFT, for each of these n.
      fresh: a second source, for a loss that reads two batches; None if there is none.
      loss: its own loss instead of the study's losses; empty for the study's losses.
      beta_factor: its beta as a multiple of the study's, if it is trained at one setting.
      contrasts: comparisons with other arms of the table.
      panel: the figure that it is drawn in.
      colour: colour of its marks in every figure, as "#RRGGBB".
      shape: shape of its marks in every figure, one of `SHAPES`.
    """

    name: str
    reads: str
    source: Callable[[Branch], SourceConfig] | None = None
    best_of: tuple[int, ...] = ()
    fresh: Callable[[Branch], SourceConfig] | None = None
    loss: str = ""
    beta_factor: float = 1.0
    contrasts: tuple[Contrast, ...] = ()
    panel: str = MAIN
    colour: str = "#CC79A7"
    shape: str = "triangle-down"

    def __post_init__(self) -> None:
        """Raises UserError if a folder cannot have this name, source and best_of conflict, or it cannot be drawn."""
        if not re.fullmatch(r"[\w.]+", self.name):
            raise UserError(f"an arm has the name {self.name!r}: use only letters, digits, _ and .")
        if (self.source is None) != bool(self.best_of):
            raise UserError(f"the arm {self.name} has source={self.source}, best_of={self.best_of}: give one of them")
        # Otherwise only the report would refuse them, after all jobs.
        if self.shape not in SHAPES:
            raise UserError(f"the arm {self.name} has shape={self.shape!r}: {nearest(str(self.shape), SHAPES)}")
        if not re.fullmatch(r"#([0-9A-Fa-f]{3}){1,2}", str(self.colour)):
            raise UserError(f"the arm {self.name} has colour={self.colour!r}: write it in hex, such as '#CC79A7'")

    def sources(self, branch: Branch) -> tuple[SourceConfig, SourceConfig | None]:
        """What it trains on, and its second source; raises UserError if its functions do not return sources."""
        assert self.source is not None
        try:
            source, fresh = self.source(branch), self.fresh and self.fresh(branch)
        except _NoRun:
            raise
        except UserError as error:
            raise UserError(f"the arm {self.name} has a source that is refused: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, NameError, TypeError, ValueError) as error:
            raise UserError(f"the arm {self.name} has a source that raises {error!r}: mend it") from error
        for each in (source,) if fresh is None else (source, fresh):
            if not isinstance(each, DatasetConfig | OnlineConfig):
                raise UserError(
                    f"the arm {self.name} has a source that gives {each!r}: give a DatasetConfig or an OnlineConfig"
                )
        return source, fresh


# For two arms of which one may be swept: a sweep has more tries than one run.
_fair = functools.partial(Contrast, at_shared_settings=True)

ARMS = (
    Arm(
        name="online",
        reads="two fresh samples of the policy, labelled by the proxy preference model",
        source=lambda branch: branch.online(),
        contrasts=(Contrast("offline"), Contrast("shuffled")),
        colour="#0072B2",
        shape="circle",
    ),
    Arm(
        name="shuffled",
        reads="the pairs of an online run, D_online, in random order",
        source=lambda branch: branch.dataset(branch.run_of("online") / RECORD),
        contrasts=(Contrast("offline"),),
        colour="#009E73",
        shape="triangle-up",
    ),
    Arm(
        name="offline",
        reads="the fixed dataset D_golden, labelled by the golden model",
        source=lambda branch: branch.dataset(branch.golden_pairs),
        colour="#E69F00",
        shape="square",
    ),
    # Figure 13: how much shuffling hurts.
    Arm(
        name="replayed",
        reads="D_online in its order",
        source=lambda branch: branch.dataset(branch.run_of("online") / RECORD, order="recorded"),
        contrasts=(_fair("online"),),
        panel=WINDOWS,
        colour="#56B4E9",
        shape="triangle-down",
    ),
    Arm(
        name="small_windows",
        reads="D_online, shuffled within windows of a thousandth of the run's steps (4 of 4,000 in the paper)",
        source=lambda branch: branch.stream(1000),
        contrasts=(_fair("online"),),
        panel=WINDOWS,
        colour="#CC79A7",
        shape="triangle-right",
    ),
    Arm(
        name="large_windows",
        reads="D_online, shuffled within windows of an eighth of the run's steps (500 of 4,000 in the paper)",
        source=lambda branch: branch.stream(8),
        contrasts=(_fair("online"), _fair("shuffled")),
        panel=WINDOWS,
        colour="#D55E00",
        shape="triangle-left",
    ),
    # Figures 5 and 12: what makes offline pairs good.
    Arm(
        name="final_vs_final",
        reads="pairs of the final online policy, labelled by the golden model (4k vs 4k in the paper)",
        source=lambda branch: branch.dataset(branch.pairs("final_vs_final", [branch.run_of("online")])),
        contrasts=(_fair("offline"),),
        panel=DATASETS,
        colour="#CC79A7",
        shape="triangle-right",
    ),
    Arm(
        name="sft_vs_early",
        reads="a response of SFT against one of an early online policy, labelled by the golden model (sft vs 800)",
        source=lambda branch: branch.dataset(branch.pairs("sft_vs_early", [branch.sft, branch.early_of("online")])),
        contrasts=(_fair("offline"), _fair("final_vs_final"), _fair("early_vs_final")),
        panel=DATASETS,
        colour="#56B4E9",
        shape="triangle-down",
    ),
    Arm(
        name="early_vs_final",
        reads="a response of an early online policy against one of the final one, labelled by the golden model "
        "(800 vs 4k)",
        source=lambda branch: branch.dataset(
            branch.pairs("early_vs_final", [branch.early_of("online"), branch.run_of("online")])
        ),
        contrasts=(_fair("offline"), _fair("final_vs_final")),
        panel=DATASETS,
        colour="#D55E00",
        shape="triangle-left",
    ),
    # Beyond the paper: how fresh samples have to be (arXiv 2506.21495).
    *(
        Arm(
            name=f"refresh_{every}" if every else "refresh_never",
            reads=f"two samples of the policy as it was up to {every} steps ago, labelled by the proxy"
            if every
            else "two samples of SFT, labelled by the proxy",
            source=functools.partial(Branch.online, refresh_every=every),
            contrasts=(Contrast("online"), Contrast("offline")),
            panel=REFRESH,
            colour=colour,
            shape=shape,
        )
        for every, colour, shape in (
            *((4, "#56B4E9", "triangle-down"), (16, "#CC79A7", "triangle-right")),
            *((64, "#D55E00", "triangle-left"), (0, "#7B4FA3", "wedge")),
        )
    ),
    # Beyond the paper: more samples per prompt; trains on the best, or on the best and the worst (arXiv 2405.07863).
    *(
        Arm(
            name=f"best_of_{samples}",
            reads=f"the winner of {samples} fresh samples of the policy under the proxy",
            source=functools.partial(Branch.online, samples=samples),
            loss="best_of_n",
            contrasts=(Contrast("online"),),
            panel=BEST_OF_N,
            colour=colour,
            shape=shape,
        )
        for samples, colour, shape in ((4, "#56B4E9", "triangle-down"), (8, "#CC79A7", "triangle-right"))
    ),
    Arm(
        name="sft_best_of_n",
        reads="the winner of n samples of SFT under the proxy: no policy is trained, and its KL is at most "
        "log n - (n - 1) / n",
        best_of=(2, 4, 8, 16),
        contrasts=(Contrast("online"), Contrast("offline")),
        panel=BEST_OF_N_OF_SFT,
        colour="#7B4FA3",
        shape="wedge",
    ),
    *(
        Arm(
            name=f"best_vs_worst_{samples}",
            reads=f"the best and the worst of {samples} fresh samples of the policy under the proxy",
            source=functools.partial(Branch.online, samples=samples, keep="best_and_worst"),
            contrasts=(Contrast("online"),),
            panel=BEST_VS_WORST,
            colour=colour,
            shape=shape,
        )
        for samples, colour, shape in ((4, "#56B4E9", "triangle-down"), (8, "#CC79A7", "triangle-right"))
    ),
    # Beyond the paper: how good the proxy has to be.
    *(
        Arm(
            name=f"proxy_of_{labels}",
            reads=f"two fresh samples of the policy, labelled by a proxy that learned from {labels:,} labels",
            source=functools.partial(Branch.online, proxy_labels=labels),
            contrasts=(Contrast("online"), Contrast("offline")),
            panel=PROXY_LABELS,
            colour=colour,
            shape=shape,
        )
        for labels, colour, shape in (
            *((500, "#D55E00", "triangle-left"), (2000, "#CC79A7", "triangle-right")),
            (8000, "#56B4E9", "triangle-down"),
        )
    ),
    # Beyond the paper: online at other strengths of regularisation.
    *(
        Arm(
            name=name,
            reads=f"two fresh samples of the policy, labelled by the proxy, at {factor:g} times the beta",
            source=Branch.online,
            beta_factor=factor,
            contrasts=(Contrast("online"), Contrast("offline")),
            panel=BETAS,
            colour=colour,
            shape=shape,
        )
        for name, factor, colour, shape in (
            ("low_beta", 0.1, "#56B4E9", "triangle-down"),
            ("high_beta", 3.0, "#CC79A7", "triangle-right"),
        )
    ),
    # Beyond the paper: other objectives.
    Arm(
        name="hypo",
        reads="D_golden by DPO, and the KL to SFT on fresh samples of the policy (arXiv 2406.01462)",
        source=lambda branch: branch.dataset(branch.golden_pairs),
        fresh=lambda branch: OnlineConfig(branch.dataset(branch.golden_pairs), sampler=branch.sampler, record=False),
        loss="hypo",
        contrasts=(_fair("offline", loss="dpo"),),
        panel=OBJECTIVES,
        colour="#56B4E9",
        shape="triangle-down",
    ),
    Arm(
        name="chi_po",
        reads="D_golden by chi-PO, which bounds over-optimisation (arXiv 2407.13399)",
        source=lambda branch: branch.dataset(branch.golden_pairs),
        loss="chi_po",
        contrasts=(_fair("offline", loss="dpo"),),
        panel=OBJECTIVES,
        colour="#CC79A7",
        shape="triangle-right",
    ),
    Arm(
        name="nash_md",
        reads="two fresh samples of the policy, each labelled by the proxy against a sample of the mixture with SFT "
        "(arXiv 2312.00886)",
        source=functools.partial(Branch.online, labels="soft", against="mixture", mixture=MIXTURE),
        loss="nash_md",
        contrasts=(Contrast("online", loss="ipo"),),
        panel=SELF_PLAY,
        colour="#56B4E9",
        shape="triangle-down",
    ),
    Arm(
        name="ipo_md",
        reads="two fresh samples of the policy's mixture with SFT, labelled by the proxy (arXiv 2403.08635)",
        source=functools.partial(Branch.online, labels="soft", mixture=MIXTURE),
        loss="ipo_md",
        contrasts=(Contrast("online", loss="ipo"),),
        panel=SELF_PLAY,
        colour="#CC79A7",
        shape="triangle-right",
    ),
)

# The golden policy: the opponent of the win rate. It is trained only under IPO, and is not in any contrast.
GOLDEN = Arm(
    name=OPPONENT,
    reads="two fresh samples of the policy, labelled by the golden model itself: the opponent of the win rate",
    source=lambda branch: dataclasses.replace(branch.online(), judge=JudgeConfig(str(branch.golden))),
    colour="#8C8C8C",
    shape="diamond",
)


def arms_of(names: Sequence[str]) -> tuple[Arm, ...]:
    """The arms with these names; raises UserError if an arm does not exist, or two have the same name."""
    table, taken = {arm.name: arm for arm in ARMS}, {*NO_ARMS}
    arms = []
    for name in names:
        arm = _own_arm(name) if ":" in name else table.get(name)
        if not isinstance(arm, Arm):
            raise UserError(f"names has {name!r}, which is not an arm: {nearest(name, table)}")
        if arm.name in taken:
            raise UserError(f"names has {name!r}, but there already is an arm {arm.name!r}: leave it out, or rename it")
        taken.add(arm.name)
        arms.append(arm)
    known = [*table, *taken]
    for arm in arms:
        for contrast in arm.contrasts:
            if contrast.other not in known:
                raise UserError(
                    f"names: the arm {arm.name!r} has a contrast with {contrast.other!r}, which is not an arm: "
                    f"{nearest(contrast.other, known)}"
                )
    return tuple(arms)


def _own_arm(name: str) -> Any:
    """The object that "module:object" names; what it or the module refuses is told as an error of the setting."""
    try:
        return load_named(name, "the arm")
    except UserError as error:
        raise UserError(f"names: {error}") from error


def file_word(loss: str) -> str:
    """The name of a loss for file names; some file systems refuse the colon of "module:function"."""
    return loss.replace(":", "_")
