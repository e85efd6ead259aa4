"""What a process does around its work.

startup           before PyTorch is imported: Ctrl-C, and the folder of the compile cache
ranges            allowed ranges of numbers given by the user
out_of_memory     errors of failed memory allocation, reported in one line
tokenizer_trial   an unknown tokenizer.json, tried in a process of its own
"""
