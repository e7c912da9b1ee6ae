"""Flow matching: path, times, loss, guidance, samplers. Knows no network."""
