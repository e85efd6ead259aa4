"""The model as programs: graphs of tensors alone, and the folders that hold them.

graphs   functions of the model as graphs of ops that a target can run
folder   a folder of .pt2 files and its report
"""
