"""What a run reports while it trains, and how it is stopped."""
