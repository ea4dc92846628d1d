"""Datasets: a split of sentences and videos is read from files, or generated, and cut into batches."""

from cnm.data.annotations import Sample, read_annotations
from cnm.data.batch import Batch
from cnm.data.features import load_features
from cnm.data.loader import BatchLoader
from cnm.data.plant import plant
from cnm.data.split import Split, load_vocabulary, open_split
from cnm.data.vocabulary import Vocabulary

__all__ = [
    "Batch",
    "BatchLoader",
    "Sample",
    "Split",
    "Vocabulary",
    "load_features",
    "load_vocabulary",
    "open_split",
    "plant",
    "read_annotations",
]
