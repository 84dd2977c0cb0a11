"""Service transaksi: deposits and withdrawals over HTTP."""
