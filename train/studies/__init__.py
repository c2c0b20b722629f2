"""Studies of attention maps: what Monarch, top-k and low-rank keep of them, how dense they are, which tile suits."""
