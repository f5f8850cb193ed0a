"""The memory benchmark: the peak of each function under its worst legal load, against the memory it is given.

`python -m bench.memory` prints a table and exits with 1 if a peak is above the function's `MemorySize`, which it reads
from template.yaml. `--only NAME` runs one function. `--small` runs loads of a few seconds, which show that everything
works, and no peak.

Each load runs in a process of its own, because the peak of a process never falls. The process imports the function's
handler and calls it with the events that Lambda would send. AWS is the emulator of the local stack, Claude and the
receivers of webhooks are servers on the loopback interface; all of them are outside that process. What a load must have
done is checked afterwards: the peak of a function that gave up early means nothing.
"""
