"""What `experiments.dataset` is made of.

report       the command `report`
inspection   what is known of each row
duplicates   pictures that look alike
statistics   what a dataset holds, as numbers and as text
html         the same as one page
verify       some pictures encoded again and compared
"""
