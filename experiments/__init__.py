import os

LAUNCHER = os.getppid()  # who started this process, read before the seconds that imports take
