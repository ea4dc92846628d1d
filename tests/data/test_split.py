"""Splits, batches, loader, the synthetic source and planted features."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from small_runs import SENTENCES, synthetic_config, write_files

from cnm.config import CNMConfig
from cnm.data import (
    BatchLoader,
    Split,
    Vocabulary,
    load_vocabulary,
    open_split,
    plant,
    read_annotations,
    vocabulary_files,
)
from cnm.data.synthetic import GAP, MIN_LENGTH
from cnm.errors import InputError


@pytest.fixture(scope="module")
def split() -> Split:
    return open_split(synthetic_config(dataset__num_videos=20).dataset, "train")


def test_a_batch_holds_what_its_fields_promise(split: Split) -> None:
    indices = [3, 0, 7]
    batch = split.batch(indices)
    L = int(batch.word_lengths.max())
    T, frame_dim = batch.frames.shape[1:]
    assert batch.frames.shape == (3, T, frame_dim)
    assert batch.frames.dtype == batch.words.dtype == batch.mask_weights.dtype == torch.float32
    assert batch.frame_lengths.tolist() == [T] * 3
    assert batch.word_ids.shape == (3, L)
    assert batch.words.shape[:2] == (3, L + 1)
    assert (batch.words[:, 0] == 0).all()
    for row, index in enumerate(indices):
        words = split.samples[index].sentence.split()
        n = len(words)
        assert batch.word_lengths[row] == n
        assert [split.vocabulary.words[i] for i in batch.word_ids[row, :n]] == words
        assert (batch.word_ids[row, n:] == 0).all()
        vectors = split.vocabulary.vectors[batch.word_ids[row, :n].numpy()]
        np.testing.assert_array_equal(batch.words[row, 1 : n + 1], vectors)
        assert (batch.words[row, n + 1 :] == 0).all()
        assert batch.mask_weights[row].sum() == pytest.approx(1)
        assert (batch.mask_weights[row, n:] == 0).all()


@pytest.mark.parametrize("source", ["synthetic", "files"])
def test_frames_come_in_bf16_where_that_is_asked_for(source: str, tmp_path: Path) -> None:
    """Rounded once, from memory, the cache and a loader's buffers alike, whoever fills the cache first."""
    if source == "files":
        config = CNMConfig.from_json(write_files(tmp_path)).dataset
    else:
        config = synthetic_config(dataset__num_videos=20).dataset
    for _ in range(2):  # with a new cache and with an old one
        narrow = open_split(config, "train", dtype=torch.bfloat16)
        wide = open_split(config, "train")
        assert narrow.batch([0, 3]).words.dtype == torch.float32
        for (indices, batch), (_, expected) in zip(
            BatchLoader(narrow, 3, shuffle=False).epoch(), BatchLoader(wide, 3, shuffle=False).epoch(), strict=True
        ):
            assert torch.equal(batch.frames, expected.frames.bfloat16())
            assert torch.equal(batch.frames, narrow.batch(indices).frames)


def test_no_batch_holds_a_timestamp(split: Split) -> None:
    names = {field.name for field in dataclasses.fields(split.batch([0]))}
    assert names == {"frames", "frame_lengths", "words", "word_ids", "word_lengths", "mask_weights"}


def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own(split: Split) -> None:
    loader = BatchLoader(split, 8, shuffle=True, seed=1)
    orders = [[int(i) for indices, _ in loader.epoch(epoch) for i in indices] for epoch in (0, 1, 0)]
    assert sorted(orders[0]) == list(range(len(split)))
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    assert orders[0] != [int(i) for i in BatchLoader(split, 8, shuffle=True, seed=2).order(0)]
    assert len(loader) == len(list(loader.epoch(0))) == -(-len(split) // 8)


def test_an_epoch_goes_on_where_it_was_left(split: Split) -> None:
    loader = BatchLoader(split, 8, shuffle=True, seed=1)
    whole = list(loader.epoch(3))
    rest = list(loader.epoch(3, start=2))
    assert len(rest) == len(whole) - 2
    for (a, batch_a), (b, batch_b) in zip(whole[2:], rest, strict=True):
        np.testing.assert_array_equal(a, b)
        assert torch.equal(batch_a.frames, batch_b.frames)


def test_an_abandoned_epoch_stops_its_thread(split: Split) -> None:
    epoch = BatchLoader(split, 4, shuffle=False).epoch()
    next(epoch)
    epoch.close()


def test_an_error_while_preparing_reaches_the_consumer(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(BatchLoader(split, 4, shuffle=False).epoch())


def test_the_synthetic_source_depends_on_its_seed_alone() -> None:
    def features(seed: int) -> torch.Tensor:
        return open_split(synthetic_config(dataset__seed=seed).dataset, "test").batch([0, 1]).frames

    assert torch.equal(features(1), features(1))
    assert not torch.equal(features(1), features(2))


def test_synthetic_moments_are_disjoint_and_their_frames_alike() -> None:
    config = synthetic_config(dataset__num_videos=40, dataset__max_num_frames=64, dataset__frame_dim=256)
    split = open_split(config.dataset, "train")
    moments = split.moments
    by_video: dict[str, list[int]] = {}
    for index, sample in enumerate(split.samples):
        by_video.setdefault(sample.video, []).append(index)
    assert all(2 <= len(indices) <= 3 for indices in by_video.values())
    time = (np.arange(64) + 0.5) / 64
    for indices in list(by_video.values())[:10]:
        for before, after in pairwise(indices):
            assert moments[after, 0] - moments[before, 1] > GAP - 0.01
        for index in indices:
            start, end = moments[index]
            assert end - start > MIN_LENGTH - 0.01
            frames = split.batch([index]).frames[0]
            during = torch.from_numpy((time >= start + 0.02) & (time < end - 0.02))
            signal = frames[during].mean(0)
            assert (frames[during] @ signal).mean() > 2 * (frames[~during] @ signal).mean().abs()


def test_train_and_test_share_no_video() -> None:
    config = synthetic_config().dataset
    videos = [{sample.video for sample in open_split(config, name).samples} for name in ("train", "val", "test")]
    assert not (videos[0] & videos[1] | videos[0] & videos[2] | videos[1] & videos[2])


def test_sentences_without_a_known_word(tmp_path: Path) -> None:
    config = CNMConfig.from_json(write_files(tmp_path))
    for name in ("train", "test"):
        path = Path(str(getattr(config.dataset, f"{name}_data")))
        rows = json.loads(path.read_text())
        rows[1][3] = "zebras gallop"
        path.write_text(json.dumps(rows))
    train, test = (open_split(config.dataset, name) for name in ("train", "test"))  # type: ignore[arg-type]
    assert [sample.qid for sample in train.samples] == [0, *range(2, 10)]
    assert len(open_split(config.dataset, "train", keep_wordless=True)) == 10
    assert train.notes == ["train: 1 sentences hold no known word (first: 'zebras gallop'); skipped"]
    assert len(test) == 10
    assert "localized all the same" in test.notes[0]
    assert test.batch([1]).word_lengths.tolist() == [0]


def test_sentences_that_are_not_read_to_their_end(tmp_path: Path) -> None:
    """Said in every way to open a split: with a new cache, with an old one, and of generated videos."""
    files = CNMConfig.from_json(write_files(tmp_path)).dataset.model_copy(update={"max_num_words": 4})
    longer = [sum(len(SENTENCES[row % len(SENTENCES)].split()) > 4 for row in range(10))] * 2
    made = synthetic_config(dataset__num_videos=20, dataset__max_num_words=4).dataset
    longer.append(sum(len(sample.sentence.split()) > 4 for sample in open_split(made, "train").samples))
    for config, count in zip((files, files, made), longer, strict=True):
        assert count > 0
        said = f"train: {count} sentences are longer than 4 known words; the rest of them is not read"
        assert open_split(config, "train").notes == [said]
        assert open_split(config.model_copy(update={"max_num_words": 20}), "train").notes == []


def test_a_cache_that_does_not_say_what_was_cut(tmp_path: Path) -> None:
    """Earlier versions kept three arrays, from the same words, and stay as they are."""
    config = CNMConfig.from_json(write_files(tmp_path)).dataset.model_copy(update={"max_num_words": 4})
    before = open_split(config, "train")
    (path,) = (tmp_path / "cache").glob("*/cut.npy")
    made_from = json.loads((path.parent / "made_from.json").read_text())
    made_from.pop("arrays", None)
    description = json.dumps(made_from, sort_keys=True)
    old = path.parent.with_name(hashlib.sha256(description.encode()).hexdigest()[:32])
    path.parent.rename(old)
    (old / "cut.npy").unlink()
    (old / "made_from.json").write_text(description)
    sizes = {file.name: file.stat().st_size for file in old.iterdir() if file.name != "sizes.json"}
    (old / "sizes.json").write_text(json.dumps(sizes))
    after = open_split(config, "train")
    assert after.notes == before.notes != []
    assert after.fingerprint() == before.fingerprint()


def test_a_split_that_is_not_configured(tmp_path: Path) -> None:
    config = CNMConfig.from_json(write_files(tmp_path)).dataset.model_copy(update={"val_data": None})
    with pytest.raises(InputError, match=r"no dataset\.val_data"):
        open_split(config, "val")


def test_planted_moments_carry_their_sentence(tmp_path: Path) -> None:
    config = CNMConfig.from_json(write_files(tmp_path))
    split = open_split(config.dataset, "train")
    annotations = tmp_path / "train.json"
    outputs = [tmp_path / f"{name}.hdf5" for name in ("a", "b")]
    for output in outputs:
        assert plant([annotations], split.vocabulary, output, frame_dim=256, seed=3) == 10
    assert not list(tmp_path.glob(".*hdf5*"))
    samples = read_annotations(annotations)[0]
    with h5py.File(outputs[0]) as first, h5py.File(outputs[1]) as second:
        signals: dict[str, list[np.ndarray]] = {sentence: [] for sentence in SENTENCES}
        for sample in samples:
            frames = first[sample.video][()]
            np.testing.assert_array_equal(frames, second[sample.video][()])
            time = (np.arange(len(frames)) + 0.5) / len(frames) * sample.duration
            during = (time >= sample.moment[0]) & (time < sample.moment[1])
            signals[sample.sentence.rstrip(".")].append(frames[during].mean(0))
        for sentence, means in signals.items():
            others = [mean for other, of_other in signals.items() if other != sentence for mean in of_other]
            same = np.mean([means[0] @ mean for mean in means[1:]])
            assert same > 3 * abs(np.mean([means[0] @ mean for mean in others])), sentence


def test_a_file_named_twice_is_planted_once(tmp_path: Path) -> None:
    """Charades-STA's published configuration validates on the test file."""
    config = CNMConfig.from_json(write_files(tmp_path))
    vocabulary = open_split(config.dataset, "test").vocabulary
    (tmp_path / "link.json").symlink_to(tmp_path / "test.json")
    for name, more in (("a", []), ("b", [tmp_path / "test.json", tmp_path / "link.json"])):
        plant([tmp_path / "test.json", *more], vocabulary, tmp_path / f"{name}.hdf5", frame_dim=8)
    with h5py.File(tmp_path / "a.hdf5") as once, h5py.File(tmp_path / "b.hdf5") as thrice:
        for video in once:
            np.testing.assert_array_equal(once[video][()], thrice[video][()])


def test_a_plant_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    config = CNMConfig.from_json(write_files(tmp_path))
    vocabulary = open_split(config.dataset, "train").vocabulary
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        plant([tmp_path / "train.json"], vocabulary, tmp_path / "file" / "f.hdf5", frame_dim=8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"signal": float("inf")},
        {"signal": 1e39},
        {"signal": float("nan")},
        {"signal": -1.0},
        {"frames_per_second": float("inf")},
        {"frames_per_second": 0.0},
        {"frames_per_second": 1e308},
        {"frame_dim": 0},
        {"frame_dim": 2**16 + 1},
    ],
)
def test_numbers_that_nothing_can_be_planted_with(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (tmp_path / "a.json").write_text(json.dumps([["v", 10, [1, 2], "dog"]]))
    vocabulary = Vocabulary(["<pad>", "dog"], np.ones((2, 2), np.float32))
    with pytest.raises(InputError, match=f"^{next(iter(wrong))}: must be "):
        plant([tmp_path / "a.json"], vocabulary, tmp_path / "f.hdf5", **({"frame_dim": 2} | wrong))
    assert not (tmp_path / "f.hdf5").exists()
    plant([tmp_path / "a.json"], vocabulary, tmp_path / "f.hdf5", frame_dim=2, signal=1e6)
    with h5py.File(tmp_path / "f.hdf5") as file:
        assert np.isfinite(file["v"][()]).all()


def test_real_charades_sentences(shared_data: Path, tmp_path: Path) -> None:
    """Every sentence holds known words, and none is longer than published."""
    vocabulary = Vocabulary.from_pickle(shared_data / "charades" / "glove.pkl", 1111, 300)
    lengths = [
        len(vocabulary.encode(sample.sentence, 20).ids)
        for sample in read_annotations(shared_data / "charades" / "test.json")[0]
    ]
    assert min(lengths) >= 1
    assert max(lengths) <= 13


def test_word_ids_of_a_stored_vocabulary_are_not_those_of_the_file(tmp_path: Path) -> None:
    """A word list without its vectors: the checkpoint's own vocabulary takes its place, until the vectors are there."""
    config = CNMConfig.from_json(write_files(tmp_path)).dataset
    own = load_vocabulary(config)
    words = [own.words[0], *reversed(own.words[1:])]
    config.vocab_path = str(tmp_path / "v.safetensors")
    counts = [(word, 1) for word in words[1:]]
    vocabulary_files.write(config.vocab_path, counts, np.ones((len(counts), 10), np.float32), {}, "a test")
    vectors = (tmp_path / "v.safetensors").read_bytes()
    (tmp_path / "v.safetensors").unlink()
    before = open_split(config, "test", stored=own).batch(np.array([0])).word_ids
    (tmp_path / "v.safetensors").write_bytes(vectors)
    after = open_split(config, "test").batch(np.array([0])).word_ids
    spelled = [[names[int(i)] for i in ids[0] if i] for names, ids in ((own.words, before), (words, after))]
    assert spelled[0] == spelled[1]


def test_word_ids_of_another_version_of_nltk_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions cut sentences differently: 3.9 and 3.10 do where a word has an apostrophe before it."""
    config = CNMConfig.from_json(write_files(tmp_path)).dataset
    before = open_split(config, "test").batch(np.array([0])).word_ids
    monkeypatch.setattr("cnm.data.tagging.word_tokenize", lambda text, preserve_line: text.split()[1:])
    monkeypatch.setattr("nltk.__version__", "0.1")
    after = open_split(config, "test").batch(np.array([0])).word_ids
    assert after[0, : after.size(1)].tolist() == before[0, 1 : 1 + after.size(1)].tolist()
