"""What everything may need: progress bars, memory, NaN and Inf."""
