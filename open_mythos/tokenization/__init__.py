"""Text to token ids and back: tokenizers, their limits, chat templates and text that arrives in pieces."""
