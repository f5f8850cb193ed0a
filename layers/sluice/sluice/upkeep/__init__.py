"""What the schedule and the dead-letter queues start: the governor, the sweeps, loading limits, dead letters."""
