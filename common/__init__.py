"""What both services share: configuration, connections, telemetry and the message between them."""
