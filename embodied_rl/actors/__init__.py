"""Actor adapters: features to an action sample."""
