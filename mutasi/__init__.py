"""Service mutasi: stores every accepted movement, once."""
