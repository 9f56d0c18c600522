"""What every training workflow needs before it starts: rows, token ids, a model and its tokenizer."""
