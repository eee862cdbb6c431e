"""A Python callable as a judge, by name: `"my_package.judges:brevity"`.

    def brevity(prompts, responses):              # texts
        return [[-len(response) for response in each] for each in responses]

    def brevity(prompt_ids, response_ids):        # lists of token ids
        return [[-len(response) for response in each] for each in response_ids]

The callable gets N prompts and K responses to each. It returns N rows of K rewards; a higher reward is better.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any

from alignment_gap.configuration import load_named
from alignment_gap.data.records import Dataset
from alignment_gap.data.records.card import find_vocabulary
from alignment_gap.errors import Interrupted, StorageError, UserError
from alignment_gap.judges.contract import REWARDS, Judge, JudgeConfig
from alignment_gap.judges.host import Rewards, decoded, host_judge
from alignment_gap.sharding import LogicalMesh

_TEXTS, _IDS = ["prompts", "responses"], ["prompt_ids", "response_ids"]


def accepts(name: str) -> bool:
    """Whether this module opens the judge of this name."""
    return ":" in name and "/" not in name


def own_labels(name: str) -> str:
    """The labels that this judge gives by itself: rewards."""
    return REWARDS


def check(name: str) -> None:
    """Raises UserError if the callable does not exist, or has other parameters."""
    _callable(name)


def open_judge(config: JudgeConfig, dataset: Dataset, mesh: LogicalMesh) -> Judge:
    """Opens the judge of a callable; its parameters' names say whether it reads texts or token ids.

    Raises:
      UserError: the callable does not exist, it has other parameters, or the dataset's vocabulary is not found.
    """
    name = str(config.judge)
    function, parameters = _callable(name)
    function = _told(function, name)
    rewards = function if parameters == _IDS else _on_texts(function, dataset)
    return host_judge(rewards, config, mesh, {"judge": name})


def _callable(name: str) -> tuple[Callable[..., Any], list[str]]:
    """The callable of this name, and the names of its parameters."""
    function = load_named(name, "judge")
    parameters = list(inspect.signature(function).parameters) if callable(function) else []
    if parameters not in (_TEXTS, _IDS):
        raise UserError(
            f"the judge {name} takes ({', '.join(parameters)}): let it take (prompts, responses), which are texts, or "
            "(prompt_ids, response_ids)"
        )
    return function, parameters


def _told(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function; what it raises becomes one line that names the judge, with the exception as its cause."""

    def asked(*texts: Any) -> Any:
        try:
            return function(*texts)
        except (UserError, StorageError, Interrupted, MemoryError):
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            line = f"the judge {name} raises {error!r} ({place.filename}, line {place.lineno})"
            if isinstance(error, OSError):  # Such as a server that does not answer: another attempt may succeed.
                raise StorageError(f"{line}: mend it, or run the same command again", status=1) from error
            raise UserError(f"{line}: mend it") from error

    return asked


def _on_texts(function: Callable[..., Any], dataset: Dataset) -> Rewards:
    vocabulary = find_vocabulary(dataset)

    def rewards(prompts: list[list[int]], responses: list[list[list[int]]]) -> Any:
        return function(*decoded(vocabulary, prompts, responses))

    return rewards
