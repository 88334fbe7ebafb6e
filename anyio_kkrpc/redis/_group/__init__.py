"""The consumer group: what a worker takes, holds, hands back and takes over; dead letters."""
