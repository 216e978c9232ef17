"""The model: event embedding, encoder with indicator tokens, mixture of experts, read-outs and heads."""
