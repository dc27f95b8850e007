"""What a roll-out is worth: measures, yardsticks, the paper's windows, and the demo's pictures."""
