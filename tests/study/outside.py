"""What a user may add to a study without changes to the package: an arm, a claim, a loss, a judge."""

import dataclasses

import jax

from alignment_gap.study.arms import Arm, Contrast
from alignment_gap.study.claims import LEVEL, Claim
from alignment_gap.study.estimates import EqualKl


def _replayed(branch):
    return dataclasses.replace(branch.dataset(branch.run_of("online") / "record"), order="recorded")


REPLAYED = Arm(
    name="mirrored",
    reads="the pairs of an online run in the order in which it saw them",
    source=_replayed,
    contrasts=(Contrast("online"),),
    colour="#123456",
    shape="triangle-left",
)
AS_ONLINE = Claim(
    name="mirrored-is-online",
    paper="In its order the stream gives the online run again.",
    figure="3",
    hypothesis=1,
    estimate=EqualKl(("mirrored", "ipo"), ("online", "ipo")),
    holds=LEVEL,
)
# An arm whose contrast is with no arm, a loss of an array that no batch has, and a judge with other parameters.
ALONE = dataclasses.replace(REPLAYED, name="alone", contrasts=(Contrast("onlin"),))

# Arms whose source asks for an arm's record by a wrong name, gives a path, gives nothing, and has a refused setting.
RAISING, PATH, NOTHING, REFUSED = (
    dataclasses.replace(REPLAYED, name=name, source=source, contrasts=())
    for name, source in {
        "raising": lambda branch: branch.record_of("online"),
        "path": lambda branch: branch.golden_pairs,
        "nothing": lambda branch: None,
        "refused": lambda branch: branch.online(samples=1),
    }.items()
)


def misspelt(chosen_logp, rejected_logps):
    return chosen_logp - rejected_logps


def of_one_text(text):
    return [[0.0] for _ in text]


# An arm with the same name, and an object that is not an arm.
TWIN = dataclasses.replace(REPLAYED)
NO_ARM = "online"


def squared(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1):
    """A copy of IPO."""
    margin = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return (margin - 1 / (2 * beta)) ** 2


def logistic(chosen_logps, rejected_logps):
    """A loss without beta and without a reference."""
    return -jax.nn.log_sigmoid(chosen_logps - rejected_logps)


def brevity(prompt_ids, response_ids):
    """A judge that prefers short responses."""
    return [[-len(response) for response in each] for each in response_ids]
