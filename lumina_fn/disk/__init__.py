"""Everything that this project does to files on a disk; no other module opens, replaces or removes one.

reading   open a file that a user or another program may have put there: regular files of bounded size, JSON of a known shape
untrusted_folder   files of a folder from an unknown source: none may lie outside it
places    where a result may be written: never over the run's inputs
files     results that appear complete: written beside their destination, synced, moved by one rename
marks     the small file in every result that says that this project wrote it and may replace it
locks     one writer at a time
"""
