"""`lrmt data`: samples written to disk, or shown."""
