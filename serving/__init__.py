"""Export, quantise, engines, gateway."""
