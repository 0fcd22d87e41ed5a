"""Feature extractors for metrics and losses on images."""
