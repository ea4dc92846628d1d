"""Turns videos into features: decoding (PyAV), image encoders, extraction to files. Needs the extra ``[video]``."""
