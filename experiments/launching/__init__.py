"""One command on many processes.

place         the rank of this process, read from the environment
launchers     the variables of each launcher, in one table
start         runs a command in one process, or on every rank with a guard process beside it
guard         the process beside a rank that ends it when another process of the run dies
rendezvous    a rendezvous backend of torchrun that listens at one address
addresses     this host's addresses
neighbours    what ranks tell each other about where they are
distributed   how ranks connect, and the collectives that they use
abort         ends a rank at once, together with all others
stopping      stops a run after a step, the same one on all ranks
processes     a process group on this machine, for notebooks, tests and benchmarks
"""
