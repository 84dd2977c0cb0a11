"""Service mutasi: stores every accepted movement in the mutation book."""
