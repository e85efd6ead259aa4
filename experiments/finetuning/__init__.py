"""What `experiments.finetune` is made of.

settings          its flags
checks            what it refuses before it begins
feature_folders   the feature sets that --features names
loop              the run itself: load, train, save, convert
resuming          from which checkpoint a run continues
run_folder        OUT: one writer, and only a run's own files are removed
metrics           metrics.jsonl and the progress on the terminal
profiling         where the time of a few steps goes
"""
