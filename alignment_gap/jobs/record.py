"""The record of an online job: its samples, as a dataset that grows with the run."""

from __future__ import annotations

from alignment_gap.data.batches import PreferenceBatch, examples_of
from alignment_gap.data.records import close_dataset, derived
from alignment_gap.data.records.dataset import GrowingChunk, chunk_path, discard_chunks, read_chunk
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath
from alignment_gap.jobs.assembly import Assembly, gives_rewards
from alignment_gap.jobs.reading import PADDED
from alignment_gap.jobs.served import LABELS_OF_RECORD, REFERENCE_DIGEST, REFERENCE_PLACE, sampled_as
from alignment_gap.jobs.sources import Inputs
from alignment_gap.judges import PROBABILITIES, REWARDS
from alignment_gap.sharding import is_first_process, on_first_process

RECORD = "record"
_CHUNK = "until-"
# Steps whose samples share a record file. It does not depend on when checkpoints are saved, so the digest of a record
# depends only on its samples.
_CHUNK_STEPS = 200


def open_recorder(assembly: Assembly, folder: AnyPath, last_step: int) -> Recorder | None:
    """The recorder of a job that goes on after `last_step`; None if the job does not record."""
    online = assembly.config.online
    if online is None or not online.record:
        return None
    return Recorder(folder / RECORD, last_step, beside=online is assembly.config.fresh)


class Recorder:
    """Keeps the samples of every step, and writes them with every checkpoint. Only the first process does.

    Each save writes the last record file again with the new samples added, until the file is full. Samples become
    records when they are added, while the devices run the next step: a save only writes them.
    """

    def __init__(self, record: AnyPath, last_step: int, *, beside: bool):
        """Goes on after `last_step`: removes the samples of later steps.

        Args:
          record: folder of the dataset.
          last_step: step of the last checkpoint.
          beside: whether the samples come beside recorded pairs, as the batches' `fresh`.

        Raises:
          UserError: samples up to `last_step` are missing.
        """
        self._record, self._step, self._beside = record, last_step, beside
        self._pending = GrowingChunk(str(record))
        on_first_process(self._resume)

    def add(self, step: int, batch: PreferenceBatch) -> None:
        """Adds the samples of a step, given as whole numpy arrays; a full file is written."""
        drawn = batch.fresh if self._beside else batch
        if not is_first_process():
            return
        assert drawn is not None
        self._pending.extend(examples_of(drawn))
        self._step = step
        if step % _CHUNK_STEPS == 0:
            self._write()
            self._pending = GrowingChunk(str(self._record))

    def save(self) -> None:
        """Writes what was added since the last full file."""
        if is_first_process() and self._step % _CHUNK_STEPS:
            self._write()

    def _resume(self) -> None:
        step, first = self._step, _full_until(self._step)
        if first < step:
            there = sorted(_until(path.stem) for path in self._record.glob(chunk_path(self._record, f"{_CHUNK}*").name))
            until = next((each for each in there if step <= each <= first + _CHUNK_STEPS), None)
            if until is None:
                raise UserError(f"{self._record} lacks samples before step {step}: give another folder")
            examples = read_chunk(self._record, f"{_CHUNK}{until:08d}")
            self._pending.extend(examples[: len(examples) // (until - first) * (step - first)])
            self._write()
        discard_chunks(self._record, lambda name: _until(name) > step)

    def _write(self) -> None:
        """Writes the file with the samples up to this step, and removes the shorter files that it replaces."""
        step = self._step
        self._pending.write(self._record, f"{_CHUNK}{step:08d}")
        discard_chunks(self._record, lambda name: _full_until(step - 1) < _until(name) < step)


def _full_until(step: int) -> int:
    """The last step in a full record file after `step` steps."""
    return step - step % _CHUNK_STEPS


def _until(chunk: str) -> int:
    return int(chunk.rpartition("-")[2])


def close_record(assembly: Assembly, inputs: Inputs, folder: AnyPath) -> None:
    """Completes the record as a dataset; its card names the prompts, the sampling settings and the judge."""
    config, network = assembly.config, assembly.facts.network
    reading, online = inputs.fresh if config.online is config.fresh else inputs.reading, config.online
    assert reading is not None and online is not None
    roles = ["prompts"] if len(reading.datasets) == 1 else [f"prompts {i}" for i in range(len(reading.datasets))]
    shape = assembly.facts.fresh if online is config.fresh else assembly.facts.batch
    assert shape is not None
    padded = {"prompt_length": shape.prompt, "response_length": shape.response}
    facts = {"loss": config.loss.name, "seed": config.seed, **sampled_as(online, shape.batch), PADDED: padded}
    if assembly.needs_reference and config.reference_every is None and inputs.reference is not None:
        place = config.reference or config.start
        facts |= {REFERENCE_PLACE: place, REFERENCE_DIGEST: inputs.reference.digest}
    facts |= {LABELS_OF_RECORD: online.judge.labels, **inputs.judge.facts} if inputs.judge else {}
    close_dataset(
        folder / RECORD,
        vocabulary_digest=str(network.vocabulary_digest),
        provenance=derived("online", dict(zip(roles, reading.datasets, strict=True)), **facts),
        scores=REWARDS if gives_rewards(online) else PROBABILITIES,
    )
