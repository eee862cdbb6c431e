"""The commands of docs/huggingface.md run, on a folder and pairs that are as small as can be."""

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

from alignment_gap.checkpoints import open_checkpoint
from alignment_gap.checkpoints.formats import model_shapes
from alignment_gap.checkpoints.huggingface import write
from alignment_gap.checkpoints.huggingface.configs import FAMILIES
from alignment_gap.checkpoints.tensors import from_array
from alignment_gap.cli.main import main
from alignment_gap.models import DecoderConfig, T5Config

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


def run(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0, command


@pytest.mark.parametrize("vocabulary", MODELS)
def test_the_commands_take_a_folder_to_a_folder(vocabulary, tmp_path, monkeypatch):
    model, rng = MODELS[vocabulary], np.random.default_rng(0)
    companions = tmp_path / "companions"
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
    (companions / "vocabulary.model").rename(companions / vocabulary)
    tensors = {
        name: from_array(rng.normal(0, 0.1, shape).astype(np.float32), stacked="layers" in name.split("."))
        for name, shape in model_shapes(model).items()
    }
    write(tmp_path / "google" / "flan", model, tensors, companions)
    write_pairs(tmp_path / "pairs.jsonl")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # The cache of compiled functions is the tests'.
    commands = re.search(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)[1].replace("\\\n", " ").splitlines()
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
