"""The interfaces between the use cases and the outside world: Protocols of a few methods, and their formats.

Stores and queues block. The worker calls them through `Blocking`, which runs them in a thread, and in the simulation at
a step of its scheduler. Every implementation, fake or real, passes the same conformance tests.
"""
