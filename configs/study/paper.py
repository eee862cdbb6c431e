"""All arms and claims of the study on the built-in task: five seeds of 172 jobs, one to six hours of jobs each.

alignment-gap study --config=configs/study/paper.py --config.seed=0 --config.seeds=1 --workdir=runs/paper_0
alignment-gap report --runs=runs/paper_0,runs/paper_1 --pool --workdir=runs/paper
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

_spec = importlib.util.spec_from_file_location("tiny", pathlib.Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

WINDOWS = ("replayed", "small_windows", "large_windows")
DATASETS = ("final_vs_final", "sft_vs_early", "early_vs_final")
REFRESH = ("refresh_4", "refresh_16", "refresh_64", "refresh_never")
SAMPLES = ("best_of_4", "best_of_8", "sft_best_of_n", "best_vs_worst_4", "best_vs_worst_8")
PROXIES = ("proxy_of_500", "proxy_of_2000", "proxy_of_8000")
BETAS = ("low_beta", "high_beta")
OBJECTIVES = ("hypo", "chi_po", "nash_md", "ipo_md")


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.name, config.seeds = "paper", 5
    config.arms.names = ("online", "shuffled", "offline")
    config.arms.further = (*WINDOWS, *DATASETS, *REFRESH, *SAMPLES, *PROXIES, *BETAS, *OBJECTIVES)
    config.arms.losses = ("ipo", "best_of_n", "dpo", "slic", "exponential")
    config.arms.swept = ("offline", "shuffled", "chi_po")
    # The win rates bend at betas below the online beta, so these are swept too.
    config.arms.offline_betas = (0.01, 0.1)
    config.arms.offline_learning_rates = (3e-4, 1e-3)
    config.arms.offline_steps = (1, 5)
    config.evaluation.classified = ("heldout", "stream", "own")
    return config
