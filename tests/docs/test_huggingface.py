"""The commands of docs/huggingface.md run, with a folder and pairs that are as small as possible."""

import json
import pathlib
import re
import shlex
import sys

import jax
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file

from alignment_gap.checkpoints import known_network, open_checkpoint
from alignment_gap.checkpoints.formats import model_shapes
from alignment_gap.checkpoints.huggingface import write
from alignment_gap.checkpoints.huggingface.configs import FAMILIES
from alignment_gap.checkpoints.tensors import from_array
from alignment_gap.cli.main import main
from alignment_gap.data.records import open_dataset
from alignment_gap.errors import UserError
from alignment_gap.judges import JudgeConfig, open_judge
from alignment_gap.models import DecoderConfig, RewardHead, T5Config
from alignment_gap.sharding import MeshConfig, make_mesh

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
WORDS = "the cat sat on a mat while some dogs ran over many hills and found one old red ball".split()  # noqa: SIM905
SIZES = {"vocabulary_size": 64, "width": 16, "heads": 2, "head_size": 8, "mlp_width": 16}
GEMMA = {"layers": 2, "kv_heads": 1, "tied_embeddings": True, "window": 5, "full_attention_every": 2}
MODELS = {
    "spiece.model": T5Config(**SIZES, encoder_layers=1, decoder_layers=1),
    "tokenizer.model": DecoderConfig(**FAMILIES["gemma3_text"].model, **SIZES, **GEMMA, rope_local_base=100.0),
}


def write_pairs(path, count=40):
    rng = np.random.default_rng(0)

    def words():
        return " ".join(rng.choice(WORDS, 5))

    rows = []
    for _ in range(count):
        prompt = f"\n\nHuman: {words()}\n\nAssistant:"
        rows.append({side: f"{prompt} {words()}" for side in ("chosen", "rejected")})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_conversations(path, count=40):
    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        prompt, *answers = (" ".join(rng.choice(WORDS, 5)) for _ in range(3))
        rows.append(
            {
                side: [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                for side, answer in zip(("chosen", "rejected"), answers, strict=True)
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_vocabulary(companions, name):
    """Trains a vocabulary of these words, under the file name that a checkpoint's folder has."""
    companions.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Human: Assistant: " + " ".join(WORDS)] * 9),
        model_prefix=str(companions / "vocabulary"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (companions / "vocabulary.model").rename(companions / name)


def random_tensors(model, head=None):
    rng = np.random.default_rng(0)
    return {
        name: from_array(rng.normal(0, 0.1, shape).astype(np.float32), stacked="layers" in name.split("."))
        for name, shape in model_shapes(model, head).items()
    }


def commands_of(heading):
    """The commands of the first block after a heading."""
    block = re.search(r"```sh\n(.*?)```", TEXT[TEXT.index(f"## {heading}\n") :], flags=re.DOTALL)
    return block[1].replace("\\\n", " ").splitlines()


def run(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0, command


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", MODELS)
def test_the_commands_take_a_folder_to_a_folder(vocabulary, tmp_path, monkeypatch):
    model, companions = MODELS[vocabulary], tmp_path / "companions"
    train_vocabulary(companions, vocabulary)
    tensors = random_tensors(model)
    write(tmp_path / "google" / "flan", model, tensors, companions)
    write_pairs(tmp_path / "pairs.jsonl")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # The tests have their own cache of compiled functions.
    commands = commands_of("From a folder, through IPO, to a folder")
    assert len(commands) == 4
    for command in commands:
        command = command.replace("google/flan-t5-small", "google/flan").replace("pairs.jsonl.gz", "pairs.jsonl")
        run(re.sub("=(runs|google|pairs)", rf"={tmp_path}/\1", command), monkeypatch)

    tuned = open_checkpoint(tmp_path / "runs" / "ipo").tensors
    theirs = load_file(tmp_path / "runs" / "flan_ipo" / "model.safetensors")
    name = "shared.weight" if vocabulary == "spiece.model" else "model.embed_tokens.weight"
    embedding = tuned["token_embedder.embedding"].read(None)
    np.testing.assert_array_equal(theirs[name], embedding)
    assert np.abs(embedding - tensors["token_embedder.embedding"].read(None)).max() > 1e-4
    before, after = tmp_path / "google" / "flan", tmp_path / "runs" / "flan_ipo"
    assert (before / vocabulary).read_bytes() == (after / vocabulary).read_bytes()
    assert json.loads((before / "config.json").read_text()) == json.loads((after / "config.json").read_text())


def test_the_commands_make_a_judge_of_a_reward_model(tmp_path, monkeypatch):
    """Its tokenizer and chat template prepare the dataset. A dataset of another tokenizer is refused in one line."""
    model, head, companions = MODELS["tokenizer.model"], RewardHead(pad_id=0), tmp_path / "companions"
    train_vocabulary(companions, "tokenizer.model")
    template = "{% for each in messages %}{{ each.content }} {% endfor %}"
    (companions / "chat_template.jinja").write_text(template)
    tensors = random_tensors(model, head)
    write(tmp_path / "Skywork" / "reward", model, tensors, companions, head=head)
    write_conversations(tmp_path / "conversations.jsonl")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    commands = commands_of("Reward models as judges")
    assert len(commands) == 3
    for command in commands:
        command = command.replace("Skywork/Skywork-Reward-V2-Qwen3-0.6B", "Skywork/reward")
        run(re.sub("=(runs|Skywork|conversations)", rf"={tmp_path}/\1", command), monkeypatch)

    judge = tmp_path / "runs" / "reward"
    network = known_network(judge / "checkpoints" / "0")
    labelled = open_dataset(tmp_path / "runs" / "labelled")
    assert (network.kind, network.head) == ("bradley_terry", head)
    assert network.vocabulary_digest == labelled.card.vocabulary_digest
    assert labelled.card.scores == "rewards"
    assert np.std([example.scores for example in labelled]) > 1e-3
    write_pairs(tmp_path / "pairs.jsonl")
    other = f"alignment-gap data prepare --source={tmp_path}/pairs.jsonl --vocabulary=bytes --output={tmp_path}/bytes"
    run(other, monkeypatch)
    with pytest.raises(UserError, match=r"was trained with .*: prepare the dataset with the checkpoint's vocabulary"):
        open_judge(JudgeConfig(str(judge)), open_dataset(tmp_path / "bytes" / "train"), make_mesh(MeshConfig()))
