"""A round trip: import a transformers folder, take 20 steps of IPO on human pairs, export, and load it there.

python tests/parity/transformers_round_trip.py --family=t5 --pairs=pairs.jsonl.gz --vocabulary=t5.spiece.model \
    --workdir=runs/round_trip

Run it in the environment of `make parity`, with the repository in PYTHONPATH. The folder has random parameters in the
full shape of Flan-T5 small, or of a Gemma 3 with 40M parameters, and a copy of the vocabulary.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
SIZES = {
    "t5": {
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "vocab_size": 32128,
    },
    "gemma": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "query_pre_attn_scalar": 128,
        "sliding_window": 64,
        "vocab_size": 32128,
    },
}
CLASSES = {"t5": "T5", "gemma": "Gemma3"}


def command(*arguments):
    """Runs alignment-gap on 8 virtual devices, as a shell would."""
    print("alignment-gap", *arguments, flush=True)
    devices = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    code = "from alignment_gap.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment)


def round_trip(family, settings, pairs, vocabulary, workdir, *, prompt_length=64, response_length=32, steps=20):
    """Returns the largest difference of any logit, the largest logit, and how far training moved any of them.

    Args:
      family: "t5" or "gemma".
      settings: settings of transformers' config.
      pairs: human pairs in Anthropic HH's format.
      vocabulary: a SentencePiece model.
      workdir: a new folder.
      prompt_length: longer prompts are left out.
      response_length: longer responses are left out.
      steps: steps of IPO, with 8 pairs each.
    """
    import numpy as np
    from transformers_harness import our_logits, random_model, reload, their_logits

    from alignment_gap.data.records import open_dataset
    from alignment_gap.sharding import MeshConfig, make_mesh
    from alignment_gap.training import load_policy

    theirs, run, prepared, tuned, out = (workdir / name for name in ("theirs", "run", "prepared", "tuned", "out"))
    model = random_model(CLASSES[family], settings, scale=0.0)
    model.save_pretrained(theirs)
    shutil.copy(vocabulary, theirs / ("spiece.model" if family == "t5" else "tokenizer.model"))
    command("checkpoint", "import", f"--from={theirs}", f"--output={run}")
    lengths = f"--prompt_length={prompt_length}", f"--response_length={response_length}", "--bad_pairs=drop"
    command("data", "prepare", f"--source={pairs}", f"--vocabulary={run}/tokenizer", f"--output={prepared}", *lengths)
    training = (
        f"--gin.DATASET={prepared}/train",
        f"--gin.START={run}",
        f"--gin.TRAIN_STEPS={steps}",
        f"--workdir={tuned}",
    )
    settings = "--gin.BATCH_SIZE=8", "--gin.LEARNING_RATE=1e-4", "--gin.MeshConfig.layout=fsdp"
    command("train", f"--gin_file={ROOT}/gin/runs/offline_ipo.gin", *training, *settings)
    command("checkpoint", "export", f"--checkpoint={tuned}", "--format=huggingface", f"--output={out}")

    again = reload(out)
    policy, params = load_policy(tuned, make_mesh(MeshConfig(1, 1, 1)))
    dataset = open_dataset(str(prepared / "validation"))
    difference = largest = moved = 0.0
    for example in dataset[:4]:
        logits = our_logits(
            policy, params, example.prompt[None], [len(example.prompt)], example.responses[0][None, None]
        )
        expected = their_logits(again, example.prompt, example.responses[0])
        difference = max(difference, np.abs(logits[0, 0] - expected).max())
        largest = max(largest, np.abs(expected).max())
        moved = max(moved, np.abs(their_logits(model, example.prompt, example.responses[0]) - expected).max())
    return difference, largest, moved


def main():
    """Reads the command line and prints what `round_trip` returns."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("family", "pairs", "vocabulary", "workdir"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    workdir = pathlib.Path(given.workdir)
    difference, largest, moved = round_trip(given.family, SIZES[given.family], given.pairs, given.vocabulary, workdir)
    print(f"largest difference {difference:.1e} of logits up to {largest:.1e}; training moved one by {moved:.1e}")


if __name__ == "__main__":
    main()
