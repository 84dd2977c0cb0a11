"""What goes deeper than the HTTP contract: rules, faults, security, tracing."""
