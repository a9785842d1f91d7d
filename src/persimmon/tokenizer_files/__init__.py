"""The files that describe a vocabulary: SentencePiece's `tokenizer.model`, and what the hub keeps beside it."""
