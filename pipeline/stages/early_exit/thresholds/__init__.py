"""Which thresholds the exits get: counts, limits, trials, and the searches over them."""
