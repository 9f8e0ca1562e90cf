"""Q heads: features and action to Q values. The only place where CrossQ and SAC differ."""
