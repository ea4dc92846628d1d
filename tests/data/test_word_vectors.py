"""Vocabularies made from word vectors in text, and their files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from small_runs import write_files
from typer.testing import CliRunner

from cnm.cli import app
from cnm.config import CNMConfig
from cnm.data import Vocabulary, open_split, vocabulary_files
from cnm.data.word_vectors import read_vectors
from cnm.errors import InputError

GLOVE = "the 1 2\ndog 3 4\n. . . 5 6\ncat 7 8e0\ndog 9 9\n"


def text(path: Path, content: str = GLOVE) -> Path:
    path.write_text(content)
    return path


@pytest.mark.parametrize("header", ["", "5 2\n"])
def test_glove_and_word2vec(tmp_path: Path, header: str) -> None:
    found, width = read_vectors(text(tmp_path / "g.txt", header + GLOVE), ["cat", "dog", ".", "zebra"])
    assert width == 2
    assert {word: vector.tolist() for word, vector in found.items()} == {"dog": [3, 4], "cat": [7, 8]}


@pytest.mark.parametrize("header", ["", "5 2\n"])
def test_a_byte_order_mark_and_blank_lines_are_no_words(tmp_path: Path, header: str) -> None:
    found, _ = read_vectors(text(tmp_path / "g.txt", f"\ufeff{header}{GLOVE}\n"), ["the", "cat"])
    assert {word: vector.tolist() for word, vector in found.items()} == {"the": [1, 2], "cat": [7, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no vectors"),
        ("the 1 2 3\n", "its vectors are 3 wide, but 2 are expected"),
        ("9 3\nthe 1 2 3\n", "its vectors are 3 wide, but 2 are expected"),
        ("5 2\nthe 1 2 3\n", "line 2 is not a word and 2 numbers"),
        ("the one two\n", "line 1 is not a word and 2 numbers"),
        ("the\n", "line 1 is not a word and its numbers"),
        ("the 1 2\ndog 3", "line 2 ('dog') does not hold 2 finite numbers"),
        ("the 1 2\nzebra 3", "is cut short after 2 words"),
        ("9 2\nthe 1 2\ndog 3 4\n", "is cut short after 2 words, and its header says 9"),
        ("the 1 2\ndog nan 4\n", "line 2 ('dog') does not hold 2 finite numbers"),
        ("the 1 2\ndog 1e300 4\n", "line 2 ('dog') does not hold 2 finite numbers"),
        ("the 1 2\ndog x 4\n", "line 2 ('dog') does not hold 2 finite numbers"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read_vectors(text(tmp_path / "g.txt", content), ["the", "dog"], 2)


def test_the_command_and_training_data_over_it(tmp_path: Path) -> None:
    config = CNMConfig.from_json(write_files(tmp_path)).dataset
    pickled = Vocabulary.from_pickle(str(config.vocab_path), config.vocab_size, config.word_dim)
    lines = [
        " ".join([word, *map(repr, map(float, vector))])
        for word, vector in zip(pickled.words, pickled.vectors, strict=True)
        if word not in ("<pad>", "dog")
    ]
    output = tmp_path / "v.safetensors"
    arguments = ["vocabulary", "--annotations", str(config.train_data), "--output", str(output), "--vectors"]
    arguments.append(str(text(tmp_path / "g.txt", "\n".join(lines) + "\n")))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "without a vector: 2 words, first . (10), dog (2)" in result.output
    assert f"--set dataset.vocab_size={len(lines)} --set dataset.word_dim=10" in result.output
    content = json.loads((tmp_path / "v.json").read_text())
    assert content["words"][:2] == ["the", "a"]
    assert content["counts"] == sorted(content["counts"], reverse=True)
    assert content["unknown"] == {".": 10, "dog": 2}
    vocabulary = Vocabulary.from_file(output, 3, 10)
    assert vocabulary.words == ["<pad>", *content["words"][:3]]
    for word in vocabulary.words[1:]:
        a, b = vocabulary.id(word), pickled.id(word)
        np.testing.assert_array_equal(vocabulary.vectors[a], pickled.vectors[b])
    split = open_split(config.model_copy(update={"vocab_path": str(output), "dataset": "custom"}), "train")
    assert split.batch([0]).word_ids.tolist() == [_ids(content["words"])]
    assert "is not written over" in CliRunner().invoke(app, arguments).output


def _ids(words: list[str]) -> list[int]:
    return [words.index(word) + 1 for word in "a person opens the door".split()]


def test_two_files_that_do_not_belong_together(tmp_path: Path) -> None:
    for name, value in (("a.json", 1.0), ("b.json", 2.0)):
        vocabulary_files.write(tmp_path / name, [("x", 2)], np.full((1, 2), value, np.float32), {}, "text")
    with pytest.raises(InputError, match=r"are 2 wide, but word_dim is 3"):
        Vocabulary.from_file(tmp_path / "a.json", 5, 3)
    (tmp_path / "b.safetensors").replace(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors: is not the file that a\.json was written with"):
        Vocabulary.from_file(tmp_path / "a.json", 5, 2)
    (tmp_path / "a.safetensors").write_bytes(b"text")
    with pytest.raises(InputError, match=r"a\.safetensors: is not a safetensors file"):
        Vocabulary.from_file(tmp_path / "a.safetensors", 5, 2)
    for content, message in (("{}", "holds no list of words"), ('{"words": ["x", "x"]}', "'x' is there twice")):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(InputError, match=message):
            Vocabulary.from_file(tmp_path / "a.safetensors", 5, 2)
