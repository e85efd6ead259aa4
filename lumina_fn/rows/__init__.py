"""The rows of a user's dataset, of whatever form: read in order, named, and never held in memory all at once.

opened     the form that a file, a folder or a pattern has, and its rows
row        what a row means: its file, its caption, and why it cannot be used
lists      JSON and JSONL
tables     CSV
folders    pictures with captions beside them, and Hugging Face's metadata files
tars       WebDataset's archives
parquet    Parquet files with pictures in them
"""
