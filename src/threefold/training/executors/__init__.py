"""Where the jobs of a run are done: in this process, in one process per device, or on a cluster."""
