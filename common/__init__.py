"""What both services need: configuration, connections, telemetry."""
