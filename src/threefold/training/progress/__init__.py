"""What a run reports while it trains: to a terminal, a file of events, experiment trackers."""
