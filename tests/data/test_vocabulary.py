"""Words that are kept, how sentences are cut and tagged, and the chance of each word to be masked."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnm.data import Vocabulary
from cnm.data.tagging import FUNCTION_WORDS, tag, tagger_name, tokenize
from cnm.errors import InputError
from cnm.masking import mask_weights


def write(path: Path, **changes: Any) -> Path:
    content = {
        "w2id": {"<PAD>": 0, "the": 1, "dog": 2, "runs": 3},
        "id2vec": [np.full(2, float(i), np.float32) for i in range(4)],
        "counter": collections.Counter({"runs": 5, "the": 9, "dog": 5}),
    }
    path.write_bytes(pickle.dumps({k: v for k, v in (content | changes).items() if v is not None}))
    return path


def test_the_most_common_words_are_kept_in_order(tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_pickle(write(tmp_path / "v.pkl"), vocab_size=2, word_dim=2)
    assert vocabulary.words[1:] == [
        "the",
        "runs",
    ]  # a tie goes to the word counted first, as Counter.most_common has it
    np.testing.assert_array_equal(vocabulary.vectors, [[0, 0], [1, 1], [3, 3]])
    assert len(Vocabulary.from_pickle(tmp_path / "v.pkl", vocab_size=99, word_dim=2)) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counter": None}, "lacks 'counter'"),
        ({"counter": {"a": 1}}, "'counter' is a dict"),
        ({"counter": collections.Counter()}, "'counter' is empty"),
        ({"w2id": {}}, "word 'the' is counted but has no vector"),
        ({"id2vec": [np.zeros(3)] * 4}, r"'the' has shape \[3\], but word_dim is 2"),
        ({"id2vec": [np.full(2, np.nan)] * 4}, "'the' holds NaN"),
    ],
)
def test_a_vocabulary_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"v\.pkl: .*{message}"):
        Vocabulary.from_pickle(write(tmp_path / "v.pkl", **changes), 10, 2)


def test_sentences_are_lowered_tagged_and_cut() -> None:
    vocabulary = Vocabulary(["<pad>", "the", "dog", "runs", "."], np.zeros((5, 2), np.float32))
    sentence = vocabulary.encode("The Dog runs, the zebra runs.", max_words=10)
    assert sentence.ids.tolist() == [1, 2, 3, 1, 3, 4]
    assert sentence.unknown == ["zebra"]
    if tagger_name() == "function-words":
        assert sentence.content.tolist() == [False, True, True, False, True, False]
    cut = vocabulary.encode("The Dog runs the zebra.", max_words=2)
    assert (cut.ids.tolist(), cut.content.tolist(), cut.unknown, cut.cut) == (
        [1, 2],
        sentence.content[:2].tolist(),
        ["zebra"],
        ["runs", "the"],
    )
    assert vocabulary.encode("The dog runs.", max_words=3).cut == sentence.cut == []
    assert len(vocabulary.encode("zebra!", max_words=2).ids) == 0


def test_tokens_are_cut_as_treebank_rules_cut_them() -> None:
    assert tokenize("A person's book, isn't it?") == ["a", "person", "'s", "book", ",", "is", "n't", "it", "?"]


def test_full_stops_within_a_text_are_no_part_of_words() -> None:
    assert tokenize("A man opens the door. He walks in.") == [*"a man opens the door . he walks in .".split()]
    assert tokenize("Dr. Who meets Mrs. Smith at 3.5 p.m. today.") == [
        *"dr. who meets mrs. smith at 3.5 p.m. today .".split()
    ]


def test_the_function_word_list_agrees_with_tags() -> None:
    assert len(FUNCTION_WORDS) > 100
    assert all(word == word.lower() for word in FUNCTION_WORDS)
    content = [word for word, is_content in tag("the man quickly opens a red door near the window") if is_content]
    assert content == ["man", "quickly", "opens", "red", "door", "window"]


def test_mask_weights_are_a_softmax_of_2_and_1() -> None:
    content = np.array([[True, False, True], [False, True, True], [True, True, True]])
    lengths = np.array([3, 1, 0])
    weights = mask_weights(content, lengths)
    expected = np.exp([2, 1, 2]) / np.exp([2, 1, 2]).sum()
    np.testing.assert_allclose(weights, [expected, [1, 0, 0], [0, 0, 0]], rtol=1e-6)
    assert weights.dtype == np.float32


def test_it_survives_a_checkpoint() -> None:
    vocabulary = Vocabulary(["<pad>", "a", "b"], np.arange(6, dtype=np.float32).reshape(3, 2))
    again = Vocabulary.from_state(vocabulary.state())
    assert again.words == vocabulary.words
    np.testing.assert_array_equal(again.vectors, vocabulary.vectors)


def test_the_real_vocabulary(shared_data: Path) -> None:
    vocabulary = Vocabulary.from_pickle(shared_data / "charades" / "glove.pkl", 1111, 300)
    assert len(vocabulary) == 1112
    assert vocabulary.words[1:4] == [".", "person", "a"]
    assert np.isfinite(vocabulary.vectors).all()
