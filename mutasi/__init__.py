"""Service mutasi: books every accepted movement once."""
