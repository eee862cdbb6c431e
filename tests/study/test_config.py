"""A study refuses wrong settings before any work, in one line that names the setting and the remedy."""

import dataclasses
import re

import altair as alt
import pytest
import vl_convert
from built_in import write_posts
from byte_tokenizer import make_tokenizer
from outside import AS_ONLINE

from alignment_gap.configuration import from_dict, to_dict
from alignment_gap.data.text import TextSourceConfig
from alignment_gap.errors import UserError
from alignment_gap.study.analysis import OPPONENT, ORIGIN
from alignment_gap.study.arms import ARMS, GOLDEN, MAIN, SHAPES, Arm, arms_of, file_word
from alignment_gap.study.config import StudyConfig
from alignment_gap.study.run import open_studies


def nested(config, path, value):
    """The config as dictionaries. The setting at a dotted path is replaced."""
    settings = to_dict(config)
    *groups, leaf = path.split(".")
    place = settings
    for group in groups:
        place = place[group]
    place[leaf] = value
    return settings


def refused(config, path, value, workdir):
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        open_studies(from_dict(StudyConfig, nested(config, path, value)), workdir)
    assert not list(workdir.iterdir())
    return str(caught.value)


# The dataclasses refuse these, with the path of the setting.
SETTINGS = {
    "seed": (-1, "config.seed is -1: it must be at least 0"),
    "seeds": (0, "config.seeds is 0: it must be at least 1"),
    "microbatches": (0, "config.microbatches is 0"),
    "policy": (None, "config.policy and sft.start are not set: give one of them"),
    "sft.steps": (0, "config.sft.steps is 0"),
    "sft.weights": ((1.0, 2.0), "config.sft.weights is (1.0, 2.0): give one for the task and for each of also"),
    "golden.kind": ("triple", "config.golden.kind is 'triple': choose one of pairwise, bradley_terry"),
    "proxy.start": (None, "config.proxy.model and start are not set"),
    "arms.names": (("onlin",), "config.arms.names has 'onlin', which is not an arm: did you mean online?"),
    "arms.swept": (("ofline",), "config.arms.swept has 'ofline', which is not an arm: did you mean offline?"),
    "arms.further": (("online",), "config.arms.names has 'online', but there already is an arm 'online'"),
    "evaluation.classified": (("held",), "config.evaluation.classified has 'held': did you mean heldout?"),
    "arms.losses": (("ipo", "ipo"), "config.arms.losses is ('ipo', 'ipo'): give each value once"),
    "arms.offline_betas": ((0.1, -1.0), "config.arms.offline_betas is (0.1, -1.0): give one or more numbers"),
    "arms.offline_learning_rates": ((), "config.arms.offline_learning_rates is (): give one or more numbers"),
    "arms.checkpoint_steps": ((4, 2), "config.arms.checkpoint_steps is (4, 2): it must be increasing"),
    "arms.beta": (0.0, "config.arms.beta is 0.0: it must be above 0"),
    "claims": (("own",), "config.claims has 'own', which is not a claim: write module:object"),
    "evaluation.pairs": (0, "config.evaluation.pairs is 0: it must be at least 1"),
    "evaluation.shown": (-1, "config.evaluation.shown is -1: it must be at least 0"),
    "task.seed": (3, "config.task.seed is 3: a study prepares its data with its own seeds, so set seed instead"),
    "task.validation": (1.0, "config.task.validation is 1.0"),
}
# The graph and the jobs' inputs refuse these, though the jobs would run hours later.
INPUTS = {
    "arms.losses": (("ippo",), "did you mean 'ipo'"),
    "arms.batch_size": (6, "arms.batch_size is 6: it must be a multiple of"),
    "evaluation.batch_size": (7, "evaluation.batch_size is 7"),
    "evaluation.kl_prompts": (17, "kl_prompts is 17, over prompts=16: lower it"),
    "evaluation.judges": (("a/x", "b/x"), "judges has the names x, x, and one comes twice"),
    "mesh.model": (3, "takes a multiple of 6 devices but 8 are present"),
    "prepared": ("nowhere", "nowhere/train"),
    "policy.vocabulary_size": (50, "policy has vocabulary_size=50, but the task's vocabulary has"),
    "policy.dtype": ("int8", "DecoderConfig.dtype is 'int8': choose one of float32, bfloat16"),
    "policy.head_size": (0, "DecoderConfig.head_size is 0: it must be positive"),
    "sft.also": (("nowhere",), "nowhere"),
    "sft.start": ("nowhere", "nowhere has no complete checkpoint"),
    "golden.start": ("nowhere", "nowhere has no complete checkpoint"),
    "arms.start": ("nowhere", "nowhere has no complete checkpoint"),
    "task.vocabulary": ("missing.model", "missing.model"),
    "sizes": (("palm_10",), "did you mean palm_10m"),
}


@pytest.mark.parametrize("path", SETTINGS)
def test_a_setting_out_of_its_range(config, path, tmp_path):
    value, message = SETTINGS[path]
    assert message in refused(config, path, value, tmp_path)


@pytest.mark.parametrize("path", INPUTS)
def test_what_a_later_job_would_refuse(config, path, tmp_path):
    value, message = INPUTS[path]
    assert message in refused(config, path, value, tmp_path)


def test_a_loss_that_the_source_of_an_arm_does_not_serve(config, tmp_path):
    """Recorded pairs do not have the sampler's log-probs.

    The online arm's record has them, so a shuffled arm is fine.
    """
    message = refused(config, "arms.losses", ("grpo",), tmp_path)
    assert message.startswith("seed0-offline-grpo-beta0.1-lr0.01: the loss grpo needs samples of the policy with")
    arms = dataclasses.replace(config.arms, losses=("grpo",), names=("online", "shuffled"))
    open_studies(dataclasses.replace(config, arms=arms), tmp_path)


def test_a_loss_of_pairs_takes_the_two_that_a_source_of_four_keeps(config, tmp_path):
    arms = dataclasses.replace(config.arms, losses=("ipo",), names=("online", "best_vs_worst_4"))
    open_studies(dataclasses.replace(config, arms=arms), tmp_path)


def test_a_loss_or_a_judge_that_cannot_run_is_told_first(config, tmp_path):
    message = refused(config, "arms.losses", ("outside:misspelt",), tmp_path)
    assert "the loss outside:misspelt: the loss needs chosen_logp, which this batch does not have" in message
    message = refused(config, "evaluation.judges", ("outside:of_one_text",), tmp_path)
    assert message.startswith("the judge outside:of_one_text takes (text): let it take (prompts, responses)")


def test_an_arm_of_ones_own_gives_a_source(config, tmp_path):
    message = refused(config, "arms.names", ("online", "outside:RAISING"), tmp_path)
    assert message.startswith("the arm raising has a source that raises AttributeError(\"'Branch' object has no")
    message = refused(config, "arms.names", ("online", "outside:PATH"), tmp_path)
    assert message.startswith("the arm path has a source that gives ") and "give a DatasetConfig or an" in message
    message = refused(config, "arms.names", ("online", "outside:NOTHING"), tmp_path)
    assert "the arm nothing has a source that gives None" in message
    message = refused(config, "arms.names", ("online", "outside:REFUSED"), tmp_path)
    assert (
        message
        == "the arm refused has a source that is refused: samples is 1: there is nothing to compare, draw 2 or more"
    )
    message = refused(config, "arms.names", ("online", "outside:ALONE"), tmp_path)
    assert message.startswith("config.arms.names: the arm 'alone' has a contrast with 'onlin', which is not")


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        ({"shape": "star"}, "the arm online has shape='star': "),
        ({"shape": "triangle-upp"}, "the arm online has shape='triangle-upp': did you mean triangle-up?"),
        ({"colour": "#12345"}, "the arm online has colour='#12345': write it in hex, such as '#CC79A7'"),
        ({"colour": "purpel"}, "the arm online has colour='purpel': write it in hex"),
    ],
)
def test_an_arm_that_no_figure_can_draw(drawn, message):
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        dataclasses.replace(ARMS[0], **drawn)
    assert str(caught.value).startswith(message)


def test_a_wrong_shape_in_a_module_of_ones_own_is_one_line(config, tmp_path, monkeypatch):
    (tmp_path / "starry.py").write_text(
        "from alignment_gap.study.arms import Arm\nSTAR = Arm('star', 'pairs', best_of=(2,), shape='star')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"^config.arms.names: the arm star has shape='star': did you mean "):
        from_dict(StudyConfig, nested(config, "arms.names", ("online", "starry:STAR")))


def test_every_shape_is_drawn():
    values = [{"arm": shape, "x": 1} for shape in SHAPES]
    scale = alt.Scale(domain=SHAPES, range=SHAPES)
    chart = alt.Chart(alt.Data(values=values)).mark_point().encode(x="x:Q", shape=alt.Shape("arm:N", scale=scale))
    assert vl_convert.vegalite_to_svg(chart.to_dict()).count('aria-roledescription="point"') == len(SHAPES)


def test_the_range_of_a_claim_has_an_order():
    with pytest.raises(UserError, match=r"the claim 'mirrored-is-online' has holds=\(1.0, 0.0\): give the lower end"):
        dataclasses.replace(AS_ONLINE, holds=(1.0, 0.0))


def test_a_folder_with_a_comma(config, tmp_path):
    """Commas separate the folders of a setting."""
    with pytest.raises(UserError, match="a,b has a comma, but commas separate folders in settings: give another"):
        open_studies(config, tmp_path / "a,b")


def test_a_study_over_sizes_needs_a_policy_for_its_vocabulary(config, tmp_path):
    start = dataclasses.replace(config.sft, start="runs/t5")
    without = dataclasses.replace(config, policy=None, sft=start, sizes=("palm_10m",))
    with pytest.raises(UserError, match="policy is not set: set it, because a study over sizes takes vocabulary"):
        open_studies(without, tmp_path)


def test_a_judge_with_too_few_ids_is_named(config, tmp_path):
    small = dataclasses.replace(config.policy, vocabulary_size=50)
    judge = dataclasses.replace(config.proxy, model=small, start=None)
    with pytest.raises(UserError, match="proxy has vocabulary_size=50"):
        open_studies(dataclasses.replace(config, proxy=judge), tmp_path)


def test_a_vocabulary_without_sentinels_needs_judges_with_a_head_of_their_own(config, tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    with_heads = {
        name: dataclasses.replace(getattr(config, name), kind="bradley_terry") for name in ("golden", "proxy")
    }
    task = dataclasses.replace(config.task, vocabulary=str(tmp_path / "tokenizer"))
    config = dataclasses.replace(config, task=task, policy=dataclasses.replace(config.policy, vocabulary_size=260))
    message = r"the kind is 'pairwise', which marks texts with 5 sentinels, .* has 0: set the kind to 'bradley_terry'"
    for name in with_heads:
        others = {other: judge for other, judge in with_heads.items() if other != name}
        with pytest.raises(UserError, match=f"{name}: {message}"):
            open_studies(dataclasses.replace(config, **others), tmp_path)
    open_studies(dataclasses.replace(config, **with_heads), tmp_path)


def test_a_rubric_for_pairs_that_have_none_is_refused_before_anything_is_trained(config, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    task = dataclasses.replace(config.task, vocabulary="posts", source=TextSourceConfig(str(tmp_path / "own.jsonl")))
    own = dataclasses.replace(config, task=task, evaluation=dataclasses.replace(config.evaluation, judges=()))
    open_studies(own, tmp_path)
    rated = dataclasses.replace(own, evaluation=dataclasses.replace(config.evaluation, judges=("true=rubric",)))
    with pytest.raises(
        UserError, match=r"evaluation\.judges has 'rubric', but these pairs do not come from the built-in"
    ):
        open_studies(rated, tmp_path)


def test_a_dataset_in_place_of_the_folder_of_both(config, tmp_path):
    write_posts(tmp_path / "prepared" / "train", 8)
    own = dataclasses.replace(config, prepared=str(tmp_path / "prepared" / "train"))
    with pytest.raises(UserError, match="which is one dataset: give the folder that has train and validation, such as"):
        open_studies(own, tmp_path / "study")


# The table of arms.


def test_the_arms_of_the_table_by_name():
    assert arms_of(("offline", "online")) == (ARMS[2], ARMS[0])
    assert [arm.name for arm in ARMS][:3] == ["online", "shuffled", "offline"]
    assert GOLDEN.name == OPPONENT and ORIGIN not in [arm.name for arm in ARMS]


def test_every_contrast_is_with_another_arm_of_the_table():
    names = [arm.name for arm in ARMS]
    contrasts = [(arm.name, contrast.other) for arm in ARMS for contrast in arm.contrasts]
    assert all(other in names and other != name for name, other in contrasts)
    assert contrasts[0] == ("online", "offline")


def test_no_two_arms_of_a_figure_look_alike():
    for panel in {arm.panel for arm in ARMS}:
        drawn = [GOLDEN, *(arm for arm in ARMS if arm.panel in (panel, MAIN))]
        assert len({arm.colour for arm in drawn}) == len({arm.shape for arm in drawn}) == len(drawn), panel


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("online", "online"), "names has 'online', but there already is an arm 'online'"),
        (("outside:REPLAYED", "outside:TWIN"), "names has 'outside:TWIN', but there already is an arm 'mirrored'"),
        (("outside:NO_ARM",), "names has 'outside:NO_ARM', which is not an arm"),
        (("outside:REPLAYD",), "has no 'REPLAYD': did you mean REPLAYED"),
        (("nowhere:ARM",), "cannot import nowhere"),
        (("golden",), "names has 'golden', which is not an arm"),
        (("online", "outside:ALONE"), "'alone' has a contrast with 'onlin', which is not an arm: did you mean online?"),
    ],
)
def test_a_name_that_is_no_arm_or_taken(names, message):
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        arms_of(names)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["", "a b", "on/line", "a:b", "a-b"])
def test_an_arm_has_a_name_that_a_folder_can_have(name):
    with pytest.raises(UserError, match=re.escape("use only letters, digits, _ and .")):
        Arm(name, "nothing", source=lambda branch: branch.dataset(branch.golden_pairs))


def test_the_reserved_names_are_taken(monkeypatch):
    import outside

    for name in (ORIGIN, OPPONENT):
        monkeypatch.setattr(outside, "TWIN", dataclasses.replace(outside.REPLAYED, name=name))
        with pytest.raises(UserError, match=f"there already is an arm '{name}'"):
            arms_of(("outside:TWIN",))


def test_a_loss_in_the_name_of_a_file():
    assert [file_word(loss) for loss in ("best_of_n", "my.losses:hinge")] == ["best_of_n", "my.losses_hinge"]
