"""The process: device, launch, process groups, collectives, random state and logs."""
