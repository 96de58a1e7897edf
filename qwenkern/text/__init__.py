"""Text and token ids: the tokenizer, and a conversation as text."""
