"""Speed: medians measured side by side in one run, with what the clock covers."""
