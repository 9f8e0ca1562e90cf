"""Vector environments behind one interface."""
