"""The parts of `experiments.dataset`.

report       `experiments.dataset report`
inspection   what is known of each row of a dataset
duplicates   equal and similar pictures
statistics   the report as numbers and as text
html         the report as one page
verify       `experiments.dataset verify`: some pictures encoded again and compared
"""
