"""What a run costs, counted on the meta device: nothing is allocated and nothing is computed."""
