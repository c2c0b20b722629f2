"""Studies of attention: errors of approximate maps by density, density of attention, and the best tile."""
