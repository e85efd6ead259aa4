"""What `experiments.migrate` is made of: the MindSpeed-MM guide's folder as commands of this project.

run             the run: a guide to commands, or extracted features to a set
words           a shell script cut into words
shell           a launch script's variables and its one command, read without a shell
field_rules     what each field and flag of the guide means here
guide           the folder as a whole
command_lines   the commands that do the same here
"""
