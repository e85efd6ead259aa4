"""The parts of `experiments.finetune`.

settings          its flags
checks            checks of flags and features before training
feature_folders   the feature sets that --features names, read as one
loop              the run itself: load, train, save the model
resuming          checkpoints, and how a run continues from one
run_folder        OUT: one process writes it, and only a run's own files are removed
metrics           metrics.jsonl and the progress on the terminal
profiling         a profile of a few steps
"""
