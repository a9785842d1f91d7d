"""Running a model: decoders, keys and values, sampling, streaming generation."""
