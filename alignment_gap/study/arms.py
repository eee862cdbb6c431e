"""The table of arms: what each reads, what it is compared with, and how it is drawn.

An arm is one entry. `StudyConfig.arms.names` lists those of a study by name, or as "module:object" for an arm of your
own. The graph, the findings, the figures and the report know arms from here alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from alignment_gap.checks import nearest
from alignment_gap.configuration import load_named
from alignment_gap.errors import UserError
from alignment_gap.jobs.config import DatasetConfig, OnlineConfig, SourceConfig
from alignment_gap.judges import JudgeConfig
from alignment_gap.sampling import SamplerConfig
from alignment_gap.study.analysis import OPPONENT, ORIGIN, PROXY


@dataclasses.dataclass(frozen=True)
class Branch:
    """What an arm can read: the jobs of one seed, and the arms that come before it under the same loss.

    Attributes:
      golden: the run of the golden preference model.
      proxy: the run of the proxy preference model.
      sft: the run of the SFT policy.
      golden_pairs: the dataset D_golden: the human pairs with the golden model's labels.
      batch_size: prompts of a step, which all arms have.
      sampler: how fresh pairs are sampled.
      runs: of the arms that come before, by name; of an arm that is swept, the first.
    """

    golden: Path
    proxy: Path
    sft: Path
    golden_pairs: Path
    batch_size: int
    sampler: SamplerConfig
    runs: Mapping[str, Path]

    def run_of(self, arm: str) -> Path:
        """The run of another arm under the same loss; raises UserError where none comes before this one."""
        if arm not in self.runs:
            raise UserError(f"arms.names has an arm that reads the run of {arm!r}: name that one, and before it")
        return self.runs[arm]

    def dataset(self, folder: Path) -> DatasetConfig:
        """Batches of recorded pairs."""
        return DatasetConfig(str(folder), batch_size=self.batch_size)

    def online(self, judge: JudgeConfig) -> OnlineConfig:
        """Fresh pairs to the prompts of D_golden, labelled by a judge and recorded."""
        return OnlineConfig(self.dataset(self.golden_pairs), judge=judge, sampler=self.sampler)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A question about two arms: at equal KL, is this arm better than another? `claims` says what the paper saw.

    Attributes:
      other: the other arm.
      loss: of the other arm; empty for the loss of this one.
    """

    other: str
    loss: str = ""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of the study.

    Attributes:
      name: of the arm.
      reads: what it trains on, in one sentence that goes on after its name.
      source: the batches that it trains on.
      swept: whether it is trained at every beta and learning rate of the sweep, and not at the online setting alone.
      contrasts: with arms before or after it in the table.
      colour, shape: of its marks in every figure.
    """

    name: str
    reads: str
    source: Callable[[Branch], SourceConfig]
    swept: bool = False
    contrasts: tuple[Contrast, ...] = ()
    colour: str = "#CC79A7"
    shape: str = "triangle-down"

    def __post_init__(self) -> None:
        """Raises UserError for a name that cannot be part of a folder's."""
        if not re.fullmatch(r"[\w.]+", self.name):
            raise UserError(f"an arm is called {self.name!r}: use letters, digits, _ and . alone")


ARMS = (
    Arm(
        name="online",
        reads="two fresh samples of the policy, labelled by the proxy preference model",
        source=lambda branch: branch.online(JudgeConfig(str(branch.proxy))),
        contrasts=(Contrast("offline"), Contrast("shuffled")),
        colour="#0072B2",
        shape="circle",
    ),
    Arm(
        name="shuffled",
        reads="the pairs of an online run, D_online, in random order",
        source=lambda branch: branch.dataset(branch.run_of("online") / "record"),
        contrasts=(Contrast("offline"),),
        colour="#009E73",
        shape="triangle-up",
    ),
    Arm(
        name="offline",
        reads="the fixed dataset D_golden, labelled by the golden model, swept over settings",
        source=lambda branch: branch.dataset(branch.golden_pairs),
        swept=True,
        colour="#E69F00",
        shape="square",
    ),
)

# The golden policy: the opponent of the win rate. It is trained under IPO alone, and is no part of a contrast.
GOLDEN = Arm(
    name=OPPONENT,
    reads="two fresh samples of the policy, labelled by the golden model itself: the opponent of the win rate",
    source=lambda branch: branch.online(JudgeConfig(str(branch.golden))),
    colour="#8C8C8C",
    shape="diamond",
)


def arms_of(names: Sequence[str]) -> tuple[Arm, ...]:
    """The arms of these names; raises UserError for one that there is not, or that has another's name."""
    table, taken = {arm.name: arm for arm in ARMS}, {ORIGIN, OPPONENT, PROXY[0]}
    arms = []
    for name in names:
        arm = load_named(name, "arm") if ":" in name else table.get(name)
        if not isinstance(arm, Arm):
            raise UserError(f"names has {name!r}, which is no arm: {nearest(name, table)}")
        if arm.name in taken:
            raise UserError(f"names has {name!r}, but there is a {arm.name!r} already: leave it out, or rename it")
        taken.add(arm.name)
        arms.append(arm)
    return tuple(arms)


def file_word(loss: str) -> str:
    """A loss in the name of a file: some file systems refuse the colon of "module:function"."""
    return loss.replace(":", "_")
