"""What a run is: typed, frozen, no torch."""
