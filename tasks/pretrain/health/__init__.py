"""What is done about losses that are not finite, spikes, and dead or collapsed experts."""
