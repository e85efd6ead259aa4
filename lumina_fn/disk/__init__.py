"""Everything that this project does to files on a disk; no other module opens, replaces or removes one.

reading   open what a user or another program may have put there: regular files of bounded size, JSON of a known shape
untrusted_folder   files of a folder that somebody else packed: none of them lies outside
places    where a result may go: never over what the run reads
files     results that appear whole: written beside their place, synced, moved there by one rename
marks     the small file that every result carries, which says that it is ours and may be replaced
locks     one writer at a time
"""
