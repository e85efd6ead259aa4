"""What a process does around its work.

startup           before PyTorch is imported: Ctrl-C and the folder of the compile cache
ranges            which numbers a user may give
out_of_memory     refused memory, recognised and reported in one line
tokenizer_trial   an unknown tokenizer.json, tried in a process of its own
"""
