"""What leaves the house: the model folder, the embedder, tables of embeddings and predictions."""
