"""Where it runs: sessions, placement, weight transport, health, files."""
