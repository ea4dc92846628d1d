"""Tokens and which of them are content words: nouns, verbs, adjectives, adverbs."""

from __future__ import annotations

import re
from functools import cache

import nltk
from nltk.tokenize import word_tokenize

CONTENT_TAGS = ("NN", "VB", "JJ", "RB")  # the published code matches these anywhere in the tag

# Used without the data of nltk's tagger: English words that are not content words in video descriptions.
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those each every either neither another some any no all both half such what which whose
    i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
    ourselves they them their theirs themselves who whom someone somebody something anyone anybody anything everyone
    everything one two three four five six seven eight nine ten
    and or but nor so yet if while when where as because since until although though than whether after before
    of in on at by for with from to into onto out off up down over under through across along around about behind
    beside between near next toward towards against inside outside without within upon during among past per via
    can could may might must shall should will would
    there 's ' '' `` n't
    """.split()
)


# A full stop that ends a sentence with another behind it; the treebank rules cut off the very last one alone.
INNER_STOP = re.compile(r"(?<=\w\w\.)(?<!\b(?:mr|ms|dr|st|jr|sr|vs)\.)(?<!\bmrs\.)\s+", re.IGNORECASE)


def tokenize(sentence: str) -> list[str]:
    """Returns lower-cased tokens as the published code does: nltk's treebank rules, sentence by sentence.

    Where a text has several sentences, nltk asks data that pip does not bring; here a full stop behind a word of two
    letters or more ends one.
    """
    return [token.lower() for token in _tokens(sentence)]


def _tokens(sentence: str) -> list[str]:
    return [token for part in INNER_STOP.split(sentence) for token in word_tokenize(part, preserve_line=True)]


def tokenizer_name() -> str:
    """Returns nltk's name and version: its versions cut some sentences otherwise, such as those with ``'the``."""
    return f"nltk {nltk.__version__}"


@cache
def tagger_name() -> str:
    """Returns ``nltk`` if its tagger's data is installed, otherwise ``function-words``, the built-in list."""
    for resource in ("taggers/averaged_perceptron_tagger_eng", "taggers/averaged_perceptron_tagger"):
        try:
            nltk.data.find(resource)
            nltk.pos_tag(["word"])
        except LookupError:
            continue
        return "nltk"
    return "function-words"


def notes() -> list[str]:
    """Says where not the published tagger chooses the words."""
    if tagger_name() == "nltk":
        return []
    return [
        "a built-in list of function words tells which words are masked more often; nltk's tagger does, as published, "
        "after `python -m nltk.downloader averaged_perceptron_tagger_eng`"
    ]


def tag(sentence: str) -> list[tuple[str, bool]]:
    """Returns lower-cased tokens, each with whether it is a content word; content words are masked more often."""
    tokens = _tokens(sentence)
    if tagger_name() == "nltk":
        return [(token.lower(), any(kind in pos for kind in CONTENT_TAGS)) for token, pos in nltk.pos_tag(tokens)]
    lowered = [token.lower() for token in tokens]
    return [(token, token not in FUNCTION_WORDS and any(map(str.isalpha, token))) for token in lowered]
