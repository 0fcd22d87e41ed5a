"""Parts by name: registries, the values that keys may have, and overrides."""
