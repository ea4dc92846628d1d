"""Videos to features: decoding (PyAV), image encoders, extraction to files. The extra ``[video]`` is needed."""
