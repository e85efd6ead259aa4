"""One command on many processes.

place         the rank of this process, read from the environment
start         a command on its own, or on every rank, with a guard beside each
guard         the process that removes what is left of a run when one of its processes dies
rendezvous    torchrun's meeting point, bound to one address
addresses     this host's addresses
distributed   how ranks meet, and what they share
abort         how a rank ends together with all others
stopping      how a run stops after a step, on all ranks at once
processes     a process group on this machine, for notebooks, tests and benchmarks
"""
