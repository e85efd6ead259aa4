"""What a model is trained on: pictures and captions that became ids and codes, in files."""
