"""What the use cases need of the world, as Protocols of a few methods each.

Stores and queues block; the worker calls them through `Blocking`, which runs them in a thread (and, in a simulation, at
a step of the scheduler). Every implementation, fake or real, passes the same conformance tests.
"""
