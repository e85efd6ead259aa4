"""The parts of `experiments.migrate`: the MindSpeed-MM guide's folder becomes commands of this project.

run             the run itself: a guide to commands, or extracted features to a feature set
words           a shell script divided into words
expansion       words expanded, with marks for what is known only when a script runs
shell           a launch script's variables and its one command, read without a shell
field_rules     what each field and flag of the guide means here
guide           the folder as a whole
command_lines   the equivalent commands
"""
