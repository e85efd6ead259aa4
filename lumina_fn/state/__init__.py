"""Checkpoints of a training run.

saved_state        a training state written while training goes on, and restored on any number of ranks
manifest           the folder of checkpoints: which are complete, and how one appears and is removed
manifest_content   the fields of a checkpoint's manifest
runs               a run's folder, or a checkpoint in it, as a model
orbax_bridge       Orbax, imported when it is needed
"""
