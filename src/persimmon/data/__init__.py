"""Training data: documents, vocabularies, token stores, and rows packed from them."""
