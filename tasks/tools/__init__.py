"""What people run beside the stages: inspect, verify, repair, import, estimate. No stage imports it."""
